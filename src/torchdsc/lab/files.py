"""Files that are whole or absent, whenever a process is killed; locks that end with their process; and the cache."""

import json
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

from filelock import FileLock, Timeout
from safetensors import SafetensorError

__all__ = [
    "cache_folder",
    "expand",
    "locked",
    "made_once",
    "naming_writes",
    "new_folder",
    "read_json",
    "remove_drafts",
    "whole_folder",
    "write_json",
    "write_text",
]

_TORCH_CANNOT_WRITE = ("inline_container", "iostream error")
# Seconds of waiting for a lock in silence.
_PATIENCE = 2.0
Made = TypeVar("Made")

_logger = logging.getLogger(__name__)


def cache_folder() -> Path:
    """Where tokenizers, tokens and converted models are kept: ``$TORCHDSC_CACHE``, or ``~/.cache/torchdsc``."""
    return Path(os.environ.get("TORCHDSC_CACHE") or "~/.cache/torchdsc").expanduser()


def expand(source: str) -> str:
    """``source`` with the environment's variables for its ``${NAME}``.

    Raises:
        ValueError: If one is not set.
    """
    expanded = os.path.expandvars(source)
    unset = re.search(r"\$(\w+|\{\w+\})", expanded)
    if unset:
        raise ValueError(f"{source}: the environment variable {unset[1].strip('{}')} is not set")
    return expanded


@contextmanager
def new_folder(folder: Path) -> Iterator[None]:
    """Make a folder. If the block that follows fails, newly made folders that are still empty are removed."""
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        for path in made:
            # One that holds something by now stays, and those above it.
            with suppress(OSError):
                path.rmdir()
        raise


@contextmanager
def locked(path: Path, *, wait: bool) -> Iterator[bool]:
    """Lock a file, which is made for that and stays, until the block ends or the process dies.

    Args:
        path: The file, hidden and named ``.lock`` at its end.
        wait: For the lock, if another process holds it; a wait of seconds is logged. A lock that this thread holds
            already is an error then.

    Yields:
        Whether this process holds the lock.

    Raises:
        OSError: If the file cannot be made.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path)
    try:
        with suppress(Timeout):
            lock.acquire(timeout=_PATIENCE if wait else 0)
        if wait and not lock.is_locked:
            _logger.warning("waiting for another process, which holds %s", path)
            lock.acquire()
        yield lock.is_locked
    finally:
        lock.release()


def made_once(path: Path, read: Callable[[], Made], make: Callable[[], object]) -> Made:
    """What ``read`` finds at ``path``, after ``make`` if need be, while other processes wait for it.

    Args:
        path: A file or folder of the cache. If it is damaged, it is made anew, with a warning that says why.
        read: Raises an OSError if it is absent, or a ValueError if it is damaged.
        make: Writes it.
    """
    with suppress(OSError, ValueError):
        return read()
    with locked(path.with_name(f".{path.name}.lock"), wait=True):
        remove_drafts(path.parent, path.name)
        try:
            # Another process may have made it meanwhile.
            return read()
        except (OSError, ValueError) as error:
            if path.exists():
                _logger.warning("%s is damaged and will be made anew: %s", path, error)
        make()
        return read()


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text so that ``path`` is at any time absent, the former file, or the complete new one.

    Raises:
        OSError: If the file or its folder cannot be written, as on a full disk; it names ``path``.
    """
    with _draft_beside(path) as draft:
        new = draft / "new"
        with new.open("wb") as file:
            file.write(text.encode("utf-8"))
            file.flush()
            os.fsync(file.fileno())
        # A cache may be shared.
        new.chmod(0o644)
        new.replace(path)


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """A folder to fill with files, which takes the place of ``path`` at the end of the block, if that does not fail.

    Raises:
        OSError: If it cannot be made or written; it names ``path``.
    """
    with _draft_beside(path) as draft:
        yield draft
        # Drafts, and files of safetensors, can be read by their owner alone.
        draft.chmod(0o755)
        for file in draft.iterdir():
            file.chmod(0o644)
        shutil.rmtree(path, ignore_errors=True)
        draft.rename(path)


@contextmanager
def _draft_beside(path: Path) -> Iterator[Path]:
    """A hidden folder for what will be moved to ``path``; it is removed, by :func:`remove_drafts` after a kill."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Beside the target, because a move is atomic only within one file system.
        draft = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp"))
        try:
            yield draft
        finally:
            shutil.rmtree(draft, ignore_errors=True)
    except OSError as error:
        if error.errno is None:
            raise
        raise OSError(error.errno, os.strerror(error.errno), str(path)) from error


def remove_drafts(folder: Path, name: str | None = None) -> None:
    """Remove what killed processes left in a folder of files and folders half written.

    Args:
        folder: The folder, whose lock the caller holds.
        name: Of what they wrote; None for all.
    """
    # tempfile puts eight characters before the suffix: names that no editor gives.
    pattern = re.compile(rf"\.{'.+' if name is None else re.escape(name)}\.[a-z0-9_]{{8}}\.tmp")
    for path in folder.glob(".*.tmp"):
        if pattern.fullmatch(path.name):
            with suppress(OSError):
                shutil.rmtree(path) if path.is_dir() else path.unlink()


@contextmanager
def naming_writes(path: Path) -> Iterator[None]:
    """Turn the errors of libraries that cannot write ``path``, as on a full disk, into an OSError that names it.

    Args:
        path: The file or folder that is written inside.

    Raises:
        OSError: In place of an OSError inside, and of those that safetensors, tokenizers and torch raise instead.
    """
    try:
        yield
    except Exception as error:
        # tokenizers raises plain Exception, and torch a RuntimeError from its writer, which tells no reason.
        is_of_writing = isinstance(error, OSError | SafetensorError) or type(error) is Exception
        if not is_of_writing and not any(words in str(error) for words in _TORCH_CANNOT_WRITE):
            raise
        reason = error.strerror if isinstance(error, OSError) and error.strerror else f"{error}; is the disk full?"
        raise OSError(f"{path} could not be written: {reason}") from error


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically."""
    write_text(path, json.dumps(value, indent=1, allow_nan=True))


def read_json(path: Path, *, keys: Iterable[str] = ()) -> dict[str, Any]:
    """Read an object that :func:`write_json` wrote.

    Args:
        path: The file.
        keys: What the object must have.

    Raises:
        ValueError: If it is something else, as after an edit.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(value, dict):
            raise ValueError(f"it holds a {type(value).__name__}")
        if missing := [key for key in keys if key not in value]:
            raise ValueError(f"it lacks {', '.join(missing)}")
    except ValueError as error:
        raise ValueError(
            f"{path} is damaged: {error}; put it back, or delete it and run the experiment again"
        ) from error
    return value
