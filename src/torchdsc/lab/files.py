"""Small files that are whole or absent, whenever a run is killed."""

import json
import os
import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

__all__ = ["expand", "new_folder", "read_json", "write_atomically", "write_json", "write_text"]


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
    """Make a folder; where what follows fails, folders that were made for it and are still empty are removed."""
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

    Args:
        path: The file; its folder is made where it is missing.
        write: Called with the open binary file.

    Raises:
        OSError: If the folder cannot be made or written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # Beside the target, because a replace is atomic only within one file system.
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        # mkstemp makes files that only their owner may read; a cache may be shared.
        Path(temporary).chmod(0o644)
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text atomically."""
    write_atomically(path, lambda file: _write(file, text.encode("utf-8")))


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically."""
    write_text(path, json.dumps(value, indent=1, allow_nan=True))


def read_json(path: Path) -> dict[str, Any]:
    """Read an object that :func:`write_json` wrote.

    Raises:
        ValueError: If it is something else, as after an edit.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}; delete it to make it anew") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} is damaged: it holds a {type(value).__name__}; delete it to make it anew")
    return value


def _write(file: Any, data: bytes) -> None:
    file.write(data)
