"""Small files that are whole or absent, whenever a run is killed."""

import json
from pathlib import Path
from typing import Any

from .tokenizers import write_atomically

__all__ = ["read_json", "write_json", "write_text"]


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
