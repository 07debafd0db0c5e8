"""Rows of files and data sets, checked one by one: an error names the source, the line and the column."""

import csv
import hashlib
import io
import json
import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torchdsc.lab.files import expand
from torchdsc.lab.schema import shorten

from .config import Task

__all__ = ["Example", "Source", "read_source"]

_SUFFIXES = (".csv", ".tsv", ".jsonl", ".txt")
_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w.-]+){0,2}(:.+)?")
# Labels become float32.
_LARGEST = 3.4e38
_Row = tuple[str, dict[str, Any]]


@dataclass(frozen=True)
class Example:
    """A row.

    Attributes:
        place: Where it is, for errors.
        texts: One a column of text.
        label: Name of the class, or a number for regression; None for causal LMs.
    """

    place: str
    texts: list[str]
    label: str | float | None


@dataclass(frozen=True)
class Source:
    """What a file or data set holds.

    Attributes:
        examples: One or more.
        sha256: Of the file; of the examples for a data set of the hub.
    """

    examples: list[Example]
    sha256: str


def read_source(task: Task, source: str) -> Source:
    """Read a file or a data set of the hub.

    Args:
        task: With its kind and columns.
        source: As in the task.

    Raises:
        ValueError: If it is no such file, holds no row, lacks a column, or a text or label is none.
        OSError: If it cannot be read.
    """
    path = Path(expand(source)).expanduser()
    if path.suffix.lower() in _SUFFIXES or path.exists() or not _HUB_ID.fullmatch(source):
        content = _content(path, source)
        rows, digest = _parse(content, path, task), hashlib.sha256(content).hexdigest()
        examples = _examples(task, source, rows)
    else:
        examples = _examples(task, source, _from_hub(source))
        values = [[*example.texts, example.label] for example in examples]
        digest = hashlib.sha256(json.dumps(values).encode()).hexdigest()
    if not examples:
        raise ValueError(f"{source} must hold at least one row, got none")
    return Source(examples, digest)


def _content(path: Path, source: str) -> bytes:
    if not path.exists():
        raise FileNotFoundError(2, "No such file or directory", str(path))
    # A pipe would be waited for.
    if not path.is_file() or path.suffix.lower() not in _SUFFIXES:
        what = f"a file with the suffix {path.suffix!r}" if path.is_file() else "something else"
        raise ValueError(f"{source} must be a file ({', '.join(_SUFFIXES)}) or the id of a data set, got {what}")
    return path.read_bytes()


def _parse(content: bytes, path: Path, task: Task) -> Iterator[_Row]:
    suffix = path.suffix.lower()
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{path}, line {line}, must be UTF-8, got {content[error.start : error.end]!r}") from error
    if suffix == ".txt":
        return iter([(str(path), {"text": text})] if text.strip() else [])
    return _parse_json(text, path) if suffix == ".jsonl" else _parse_table(text, path, task, is_csv=suffix == ".csv")


def _parse_json(text: str, path: Path) -> Iterator[_Row]:
    # Not splitlines, which also cuts at characters that JSON allows in texts.
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        place = f"{path}, line {number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{place}, must be JSON: {error}") from error
        if not isinstance(row, dict):
            raise ValueError(f"{place}, must be a JSON object, got {shorten(row)}")
        yield place, row


def _parse_table(text: str, path: Path, task: Task, *, is_csv: bool) -> Iterator[_Row]:
    # A field may be as long as a C long allows.
    csv.field_size_limit(2**31 - 1)
    if is_csv:
        reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    else:
        # Quotation marks in a tab-separated file are text.
        reader = csv.reader(io.StringIO(text, newline=None), delimiter="\t", quoting=csv.QUOTE_NONE)
    columns = task.columns
    try:
        for row in reader:
            place = f"{path}, line {reader.line_num}"
            if not row:
                continue
            if columns is None:
                columns = row
                twice = [name for name in columns if columns.count(name) > 1]
                if twice:
                    raise ValueError(f"{place}, must be different columns, got {twice[0]!r} more than once")
                continue
            if len(row) != len(columns):
                raise ValueError(f"{place}, must have {len(columns)} fields, {shorten(columns)}, got {len(row)}")
            yield place, dict(zip(columns, row, strict=True))
    except csv.Error as error:
        raise ValueError(f"{path}, line {reader.line_num}, must be a table: {error}") from error


def _from_hub(source: str) -> Iterator[_Row]:
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise ImportError("a data set of the hub needs datasets: pip install 'torchdsc[corpora]'") from error
    # "user/name", or "user/name/config".
    name, _, split = source.partition(":")
    user, *rest = name.split("/")
    try:
        rows: Iterable[dict[str, Any]] = load_dataset("/".join([user, *rest[:1]]), *rest[1:], split=split or "train")
    except (ValueError, OSError) as error:
        kind = OSError if isinstance(error, OSError) else ValueError
        raise kind(f"{source} must be a file or the id of a data set that can be loaded, got: {error}") from error
    for number, row in enumerate(rows, 1):
        yield f"{source}, row {number}", row


def _examples(task: Task, source: str, rows: Iterable[_Row]) -> list[Example]:
    def value(place: str, row: dict[str, Any], column: str) -> Any:
        if column not in row:
            raise ValueError(f"{place}, must have a column {column!r}, got {shorten(list(row))}")
        return row[column]

    examples = []
    for place, row in rows:
        texts = [_text(f"{place}, column {name!r}", value(place, row, name), task) for name in task.text]
        label: str | float | None = None
        if task.kind != "causal_lm":
            read = _number if task.kind == "regression" else _class
            label = read(f"{place}, column {task.label!r}", value(place, row, task.label))
        examples.append(Example(place, texts, label))
    return examples


def _text(place: str, value: Any, task: Task) -> str:
    # Blank lines belong to a longer text; alone they have nothing to tell a label by.
    if not isinstance(value, str) or not (value.strip() or task.kind == "causal_lm"):
        raise ValueError(f"{place}, must be text, got {shorten(value)}")
    return value


def _class(place: str, value: Any) -> str:
    is_name = isinstance(value, str | int) or (isinstance(value, float) and math.isfinite(value))
    # Programs write "nan" for what is missing.
    if not is_name or str(value).strip().lower() in ("", "nan"):
        raise ValueError(f"{place}, must be the name or number of a class, got {shorten(value)}")
    return str(value)


def _number(place: str, value: Any) -> float:
    try:
        number = float(value) if isinstance(value, str | int | float) and not isinstance(value, bool) else math.nan
    except (ValueError, OverflowError):
        number = math.nan
    if not abs(number) <= _LARGEST:
        raise ValueError(f"{place}, must be a finite number, got {shorten(value)}")
    return number
