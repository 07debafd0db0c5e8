"""Small files that are whole or absent, whenever a run is killed."""

import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from safetensors import SafetensorError

__all__ = [
    "draft_beside",
    "expand",
    "file_sha256",
    "naming_writes",
    "new_folder",
    "read_json",
    "remove_drafts",
    "write_atomically",
    "write_json",
    "write_text",
]

_TORCH_CANNOT_WRITE = ("inline_container", "iostream error")
_SUFFIX = ".tmp"
# Eight characters by tempfile between the target's name and the suffix: names that no editor gives.
_DRAFT = re.compile(rf"\..+\.[a-z0-9_]{{8}}{re.escape(_SUFFIX)}")


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


def write_atomically(path: Path, write: Callable[[BinaryIO], None]) -> None:
    """Write a file so that ``path`` is at any time absent, the former file, or the complete new one.

    What killed processes left in the folder, half written, is removed: see :func:`remove_drafts`.

    Args:
        path: The file; its folder is made where it is missing.
        write: Called with the open binary file.

    Raises:
        OSError: If the folder cannot be made or written, as on a full disk; it names ``path``.
    """
    try:
        with draft_beside(path) as draft:
            with draft.open("wb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            # Drafts can be read by their owner alone; a cache may be shared.
            draft.chmod(0o644)
            draft.replace(path)
    except OSError as error:
        if error.errno is None:
            raise
        raise OSError(error.errno, os.strerror(error.errno), str(path)) from error


@contextmanager
def draft_beside(path: Path, *, is_folder: bool = False) -> Iterator[Path]:
    """An empty file or folder beside ``path``, to be filled and moved there; removed if that does not happen.

    It is locked until the process ends, so that :func:`remove_drafts` can tell whether its writer is still alive.

    Args:
        path: What is to be written; its folder is made where it is missing.
        is_folder: Whether it is a folder.

    Raises:
        OSError: If the folder cannot be made or written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_drafts(path.parent)
    # Beside the target, because a move is atomic only within one file system.
    names: dict[str, Any] = {"dir": path.parent, "prefix": f".{path.name}.", "suffix": _SUFFIX}
    while True:
        if is_folder:
            draft = Path(tempfile.mkdtemp(**names))
        else:
            descriptor, name = tempfile.mkstemp(**names)
            os.close(descriptor)
            draft = Path(name)
        with _locked(draft):
            # Another process may have taken it for a dead one's before it was locked.
            if not draft.exists():
                continue
            try:
                yield draft
            finally:
                _remove(draft)
            return


def remove_drafts(folder: Path) -> None:
    """Remove what killed processes left of :func:`draft_beside` in a folder, and nothing that a live one writes.

    Where files cannot be locked (without ``fcntl``, on some network file systems), nothing is removed.
    """
    for draft in folder.glob(f".*{_SUFFIX}"):
        if _DRAFT.fullmatch(draft.name):
            with _locked(draft) as is_abandoned:
                if is_abandoned:
                    _remove(draft)


@contextmanager
def _locked(path: Path) -> Iterator[bool]:
    """Lock a file or folder, and yield whether that succeeded: another process may hold the lock."""
    try:
        import fcntl

        # Network file systems lock only what is open for writing.
        descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    except (ImportError, OSError):
        yield False
        return
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            is_held = True
        except OSError:
            is_held = False
        yield is_held
    finally:
        os.close(descriptor)


def _remove(draft: Path) -> None:
    if draft.is_dir():
        shutil.rmtree(draft, ignore_errors=True)
    else:
        with suppress(OSError):
            draft.unlink(missing_ok=True)


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


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text atomically."""
    write_atomically(path, lambda file: _write(file, text.encode("utf-8")))


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
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}; delete it to make it anew") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} is damaged: it holds a {type(value).__name__}; delete it to make it anew")
    missing = [key for key in keys if key not in value]
    if missing:
        raise ValueError(f"{path} is damaged: it lacks {', '.join(missing)}; delete it to make it anew")
    return value


def file_sha256(path: Path) -> str:
    """The hex digest of a file's content.

    Raises:
        OSError: If it cannot be read.
    """
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write(file: Any, data: bytes) -> None:
    file.write(data)
