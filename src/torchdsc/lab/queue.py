"""A study's folder, its queue of runs, which any number of processes may share, and its results."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import yaml
from rich.console import Console

from .files import write_json, write_text

__all__ = ["locked", "share", "take_folder", "write_results"]

CONFIG, RESULTS, TABLE, REPORT = "config.yaml", "results.json", "table.md", "report.html"
_POLL_SECONDS = 5.0

Job = TypeVar("Job")


def share(
    jobs: Sequence[Job],
    run: Callable[[Job], dict[str, Any]],
    record_of: Callable[[Job], Path],
    console: Console,
) -> list[dict[str, Any]]:
    """Run jobs in order, leaving out those that another process is at, until all are done.

    Args:
        jobs: What to do.
        run: Does a job, or returns what a finished one recorded.
        record_of: The file that a finished job leaves, in the folder of its own.
        console: Where to print what begins.

    Returns:
        The records of all jobs, in order.
    """
    while True:
        open_jobs = [job for job in jobs if not record_of(job).is_file()]
        taken = False
        for job in open_jobs:
            record = record_of(job)
            with locked(record.parent / ".lock") as is_mine:
                if is_mine and not record.is_file():
                    done = sum(record_of(other).is_file() for other in jobs)
                    console.print(f"[bold]{done + 1} of {len(jobs)}[/]: {record.parent.name}", highlight=False)
                    run(job)
                    taken = True
        if not open_jobs:
            return [run(job) for job in jobs]
        if not taken:
            time.sleep(_POLL_SECONDS)


@contextmanager
def locked(path: Path, *, wait: bool = False) -> Iterator[bool]:
    """Whether this process now holds the lock, which ends with the process; always where files cannot be locked."""
    try:
        import fcntl
    except ImportError:
        yield True
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        yield True


def take_folder(values: Mapping[str, Any], folder: Path) -> None:
    """Make ``folder`` that of a study, by writing ``config.yaml``; lists of a study that is there may grow.

    Args:
        values: The study's configuration, plain values.
        folder: A new or empty folder, or this study's.

    Raises:
        ValueError: If the folder holds another study or other files.
        OSError: If it cannot be written.
    """
    file = folder / CONFIG
    wanted = yaml.safe_load(yaml.safe_dump(dict(values)))
    if file.is_file():
        kept = yaml.safe_load(file.read_text(encoding="utf-8"))
        # More seeds, methods, tasks and trials may be added to a study; what is there must stay what it is.
        changed = [name for name in wanted if not _extends(kept.get(name), wanted[name])]
        if changed:
            raise ValueError(
                f"output {folder} holds a study with {changed[0]} {kept.get(changed[0])!r} instead of "
                f"{wanted[changed[0]]!r}: choose another folder, or delete this one"
            )
    elif folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"output must be a new or empty folder, or a study's, got {folder} with other files")
    folder.mkdir(parents=True, exist_ok=True)
    write_text(file, yaml.safe_dump(wanted, sort_keys=False))


def write_results(results: Mapping[str, Any], table: str, page: str, folder: Path, console: Console) -> None:
    """Write ``results.json``, ``table.md`` and ``report.html``, and print the table and where the page is."""
    write_json(folder / RESULTS, results)
    write_text(folder / TABLE, table)
    write_text(folder / REPORT, page)
    console.print(table, markup=False, highlight=False, soft_wrap=True)
    console.print(f"report: {folder / REPORT}", highlight=False, soft_wrap=True)


def _extends(kept: Any, wanted: Any) -> bool:
    if isinstance(kept, dict) and isinstance(wanted, dict):
        return kept.keys() == wanted.keys() and all(_extends(kept[name], wanted[name]) for name in kept)
    if isinstance(kept, list) and isinstance(wanted, list):
        return all(any(_extends(item, other) for other in wanted) for item in kept)
    return bool(kept == wanted)
