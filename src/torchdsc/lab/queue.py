"""A study's folder, its queue of runs, which any number of processes may share, and its results."""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import yaml
from accelerate.utils.environment import get_int_from_env
from rich.console import Console

from .files import read_json, write_json, write_text
from .schema import SettingsError, read_yaml, shorten

__all__ = [
    "locked",
    "read_record",
    "refuse_launch",
    "refuse_shared_folders",
    "share",
    "take_folder",
    "write_results",
]

CONFIG, DATA, RESULTS, TABLE, REPORT = "config.yaml", "data.json", "results.json", "table.md", "report.html"
# Environment variables by which launchers such as torchrun and mpirun tell the number of processes.
_WORLD = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
_POLL_SECONDS = 5.0

Job = TypeVar("Job")


def share(
    jobs: Sequence[Job],
    run: Callable[[Job], dict[str, Any]],
    record_of: Callable[[Job], Path],
    console: Console,
) -> list[dict[str, Any]]:
    """Run jobs in order, skipping those that another process is running, until all are done.

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
    """Try to lock a file, or wait for the lock; it is released at the end of the block or the process.

    Yields:
        Whether this process holds the lock; always True on systems where files cannot be locked.
    """
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


def refuse_launch() -> None:
    """Refuse a launch of several processes, which would wait for each other while one of them has a run's lock.

    Raises:
        ValueError: If there is more than one.
    """
    world = get_int_from_env(_WORLD, 1)
    if world > 1:
        raise ValueError(
            f"a study takes processes that are started one by one, got a launch of {world}: "
            "start the same command several times, and they share its runs"
        )


def refuse_shared_folders(folders: Iterable[tuple[str, str]]) -> None:
    """Refuse runs whose folders would be the same.

    Args:
        folders: Name of each run's folder, and what tells the run apart.

    Raises:
        SettingsError: If two different runs have the same.
    """
    seen: dict[str, str] = {}
    for name, what in folders:
        if seen.setdefault(name, what) != what:
            raise SettingsError(
                f"{seen[name]} and {what} must differ in the names of their folders, got {name!r} twice"
            )


def take_folder(values: Mapping[str, Any], data: Mapping[str, str], folder: Path) -> None:
    """Make ``folder`` that of a study, by writing ``config.yaml`` and ``data.json``; lists of it may grow.

    Args:
        values: The study's configuration, plain values.
        data: Hashes of its files and data sets, by name.
        folder: A new or empty folder, or this study's.

    Raises:
        ValueError: If the folder holds another study or other files, or data have changed since the study began.
        OSError: If it cannot be written.
    """
    file = folder / CONFIG
    wanted = yaml.safe_load(yaml.safe_dump(dict(values)))
    if file.is_file():
        kept = read_yaml(file)
        # More seeds, methods, tasks and trials may be added to a study; what is there must stay what it is.
        changed = [name for name in wanted if not _extends(kept.get(name), wanted[name])]
        if changed:
            raise ValueError(
                f"output {folder} holds a study with {changed[0]} {kept.get(changed[0])!r} instead of "
                f"{wanted[changed[0]]!r}: choose another folder, or delete this one"
            )
    # A kill may have left a file on the way to config.yaml.
    elif folder.exists() and (
        not folder.is_dir() or any(not path.name.startswith(f".{CONFIG}.") for path in folder.iterdir())
    ):
        raise ValueError(f"output must be a new or empty folder, or a study's, got {folder} with other files")
    known = read_json(folder / DATA) if (folder / DATA).is_file() else {}
    changed = [name for name, sha256 in data.items() if known.get(name, sha256) != sha256]
    if changed:
        raise ValueError(
            f"{changed[0]} must hold what it held when the study in {folder} began, got something else: "
            "bring that back, or choose another folder"
        )
    folder.mkdir(parents=True, exist_ok=True)
    write_text(file, yaml.safe_dump(wanted, sort_keys=False))
    write_json(folder / DATA, {**known, **data})


def read_record(file: Path, kinds: Mapping[str, Any]) -> dict[str, Any]:
    """Read what a finished run recorded.

    Args:
        file: The record.
        kinds: Fields that it must have, and their types as ``isinstance`` takes them.

    Raises:
        ValueError: If it is no such record, as after a full disk.
    """
    record = read_json(file)
    wrong = [name for name, kind in kinds.items() if not isinstance(record.get(name), kind)]
    if wrong:
        received = shorten(record[wrong[0]]) if wrong[0] in record else "none"
        raise ValueError(
            f"{file} is damaged: it must have {wrong[0]}, got {received}; delete its folder to run it anew"
        )
    return record


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
