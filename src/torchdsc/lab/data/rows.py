"""Rows of files and data sets, checked one by one: an error names the source, the line and the column."""

import csv
import hashlib
import io
import json
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torchdsc.lab.files import expand
from torchdsc.lab.schema import shorten

from .hub import library, load_hub

__all__ = ["Example", "read_numbers", "read_source"]

# One text as a whole; the last two are WikiText's.
_TEXTS = (".txt", ".raw", ".tokens")
_SUFFIXES = (".csv", ".tsv", ".jsonl", ".parquet", *_TEXTS)
_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w.-]+){0,2}(:.+)?")
# Labels become float32.
_LARGEST = 3.4e38
_Kind = Literal["classification", "regression", "causal_lm"]
# Where it is, and its values by column.
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


def read_source(
    source: str, *, kind: _Kind, text: Sequence[str], label: str, columns: Sequence[str] | None = None
) -> tuple[list[Example], str]:
    """Read a file, or a data set of the hub. No value is changed: texts and names of classes are as they are written.

    Args:
        source: File (csv, tsv, jsonl, parquet, txt, raw, tokens), where ``${NAME}`` is a variable of the environment,
            or "user/name:split" or "user/name/config:split".
        kind: What labels are: names of classes, numbers ("regression") or none ("causal_lm").
        text: Columns of text; a text file has one, "text".
        label: Column of labels.
        columns: Names of the columns of a csv or tsv file without a header.

    Returns:
        The rows, one or more, and a SHA-256: of the file, or of the rows of a data set.

    Raises:
        ValueError: If it is no such file, holds no row, lacks a column, or a text or label is none.
        OSError: If it cannot be read.
    """
    path = Path(expand(source)).expanduser()
    if path.suffix.lower() in _SUFFIXES or path.exists() or not _HUB_ID.fullmatch(source):
        content = _content(path, source)
        examples = [_example(place, row, kind, text, label) for place, row in _parse(content, path, columns)]
    else:
        rows = enumerate(load_hub(source), 1)
        examples = [_example(f"{source}, row {number}", row, kind, text, label) for number, row in rows]
        content = json.dumps([[*example.texts, example.label] for example in examples]).encode()
    if not examples:
        raise ValueError(f"{source} must hold at least one row, got none")
    return examples, hashlib.sha256(content).hexdigest()


def read_numbers(source: str, *, beside: str) -> tuple[dict[str, list[float]], str]:
    """Read the numbers of a table, of all its columns but one.

    Args:
        source: File (csv, tsv, jsonl, parquet), in which ``${NAME}`` is a variable of the environment.
        beside: The column that holds no numbers, but must not be blank either.

    Returns:
        The numbers by column, in the file's order, and its SHA-256.

    Raises:
        ValueError: If it is no such file, lacks that column, has no other or no row, or a number is missing or none.
        OSError: If it cannot be read.
    """
    path = Path(expand(source)).expanduser()
    content = _content(path, source)
    numbers: dict[str, list[float]] = {}
    for place, row in _parse(content, path, None):
        if beside not in row:
            raise ValueError(f"{place}, must have a column {beside!r}, got {shorten(list(row))}")
        if row[beside] is None or not str(row[beside]).strip():
            raise ValueError(f"{place}, column {beside!r}, must not be blank, got {shorten(row[beside])}")
        numbers = numbers or {name: [] for name in row if name != beside}
        for name, values in numbers.items():
            values.append(_number(f"{place}, column {name!r}", row.get(name)))
    if not numbers:
        raise ValueError(f"{source} must hold at least one row, and a column of numbers beside {beside!r}, got none")
    return numbers, hashlib.sha256(content).hexdigest()


def _content(path: Path, source: str) -> bytes:
    # A pipe would be waited for.
    if path.exists() and (not path.is_file() or path.suffix.lower() not in _SUFFIXES):
        what = f"a file with the suffix {path.suffix!r}" if path.is_file() else "something else"
        raise ValueError(f"{source} must be a file ({', '.join(_SUFFIXES)}) or the id of a data set, got {what}")
    return path.read_bytes()


def _parse(content: bytes, path: Path, columns: Sequence[str] | None) -> Iterable[_Row]:
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        return _from_parquet(content, path)
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{path}, line {line}, must be UTF-8, got {content[error.start : error.end]!r}") from error
    if suffix in _TEXTS:
        return [(str(path), {"text": text})] if text.strip() else []
    return _from_json(text, path) if suffix == ".jsonl" else _from_table(text, path, columns, is_csv=suffix == ".csv")


@contextmanager
def _at(place: str) -> Iterator[None]:
    """Errors inside begin with the place."""
    try:
        yield
    except (ValueError, OSError, RecursionError, csv.Error) as error:
        raise ValueError(f"{place}, {error}") from error


def _from_json(text: str, path: Path) -> Iterator[_Row]:
    # Not splitlines, which also cuts at characters that JSON allows in texts.
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            place = f"{path}, line {number}"
            with _at(f"{place}, must be JSON"):
                row = json.loads(line, object_pairs_hook=_object)
            if not isinstance(row, dict):
                raise ValueError(f"{place}, must be a JSON object, got {shorten(row)}")
            yield place, row


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    _refuse_doubled([name for name, _ in pairs])
    return dict(pairs)


def _refuse_doubled(names: Sequence[str]) -> None:
    if len(set(names)) < len(names):
        raise ValueError(f"columns must be different, got {shorten(list(names))}")


# By the csv module: pandas fills rows that are too short, and pyarrow names no line.
def _from_table(text: str, path: Path, columns: Sequence[str] | None, *, is_csv: bool) -> Iterator[_Row]:
    # A field may be as long as a C long allows.
    csv.field_size_limit(2**31 - 1)
    # Quotation marks in a tab-separated file are text.
    form: Any = {"strict": True} if is_csv else {"delimiter": "\t", "quoting": csv.QUOTE_NONE}
    reader = csv.reader(io.StringIO(text, newline="" if is_csv else None), **form)
    try:
        for row in filter(None, reader):
            place = f"{path}, line {reader.line_num}"
            if columns is None:
                columns = row
                with _at(place):
                    _refuse_doubled(columns)
            elif len(row) != len(columns):
                raise ValueError(f"{place}, must have {len(columns)} fields, {shorten(columns)}, got {len(row)}")
            else:
                yield place, dict(zip(columns, row, strict=True))
    except csv.Error as error:
        raise ValueError(f"{path}, line {reader.line_num}, must be a table: {error}") from error


def _from_parquet(content: bytes, path: Path) -> Iterator[_Row]:
    with _at(f"{path}, must be parquet"):
        rows = library("pyarrow.parquet").read_table(io.BytesIO(content)).to_pylist()
    for number, row in enumerate(rows, 1):
        yield f"{path}, row {number}", row


def _example(place: str, row: dict[str, Any], kind: _Kind, text: Sequence[str], label: str) -> Example:
    for name in text if kind == "causal_lm" else (*text, label):
        if name not in row:
            raise ValueError(f"{place}, must have a column {name!r}, got {shorten(list(row))}")
    # Blank lines belong to a longer text; alone they have nothing to tell a label by.
    texts = [_text(f"{place}, column {name!r}", row[name], may_be_blank=kind == "causal_lm") for name in text]
    if kind == "causal_lm":
        return Example(place, texts, None)
    read = _number if kind == "regression" else _class
    return Example(place, texts, read(f"{place}, column {label!r}", row[label]))


def _text(place: str, value: Any, *, may_be_blank: bool) -> str:
    if not isinstance(value, str) or not (may_be_blank or value.strip()):
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
