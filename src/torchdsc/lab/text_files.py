"""Text out of files that may be compressed, no more of it than is asked for."""

from __future__ import annotations

import bz2
import codecs
import gzip
import lzma
import re
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

__all__ = ["OPEN_COMPRESSED", "binary", "decode", "read_text", "text_or_none"]

OPEN_COMPRESSED: dict[str, Callable[..., Any]] = {".xz": lzma.open, ".gz": gzip.open, ".bz2": bz2.open}
# Unpacked bytes of a file that is cut in proportion to its length, so that a limit on its parts does not limit it:
# this many, or this many times the limit.
_MOST_UNPACKED, _MOST_TIMES = 2**26, 100
_DECOMPRESSION_ERRORS = (lzma.LZMAError, zlib.error, EOFError, ValueError)
_WIKI_EXTRACTOR_START = re.compile(r"^<doc id=", re.MULTILINE)
_WIKI_EXTRACTOR_LINE = re.compile(r"^(?:<doc [^\n]*>|</doc>)[ \t]*(?:\n|\Z)", re.MULTILINE)


def text_or_none(file: Path, limit: int | None, *, whole: bool) -> str | None:
    """The text of a file, as :func:`decode` gives it and without the lines that WikiExtractor adds.

    Args:
        file: UTF-8 text of any suffix; `.xz`, `.gz` and `.bz2` are unpacked.
        limit: UTF-8 bytes that will be used of it, or of each of its parts; None for all.
        whole: Whether it is needed whole, for parts in proportion to its length. Otherwise a compressed file is
            unpacked as far as its first `limit` bytes of text take.

    Returns:
        The text; None where it is not text.

    Raises:
        ValueError: It cannot be read, is a pipe or a device, or unpacks to more than the most.
    """
    most = None if limit is None else max(_MOST_UNPACKED, _MOST_TIMES * limit)
    size = most if whole else limit
    while True:
        data, is_whole = _read_bytes(file, size)
        text = decode(data, is_whole=is_whole)
        if text is None:
            return None
        if _WIKI_EXTRACTOR_START.search(text):
            lines = text if is_whole else text[: text.rfind("\n") + 1]
            text = _WIKI_EXTRACTOR_LINE.sub("", lines)
        if is_whole or size is None or limit is None:
            return text
        if not whole and len(text.encode()) >= limit:
            return text
        if most is not None and size >= most:
            raise ValueError(
                f"corpus must be files that unpack to at most {most:,} bytes where max_bytes is given, got more from "
                f"{file}: unpack it, raise max_bytes, or name files by the splits"
            )
        # Lines that are taken out, and the ends of others, leave less text than was unpacked.
        size *= 2


def read_text(file: Path, limit: int | None, *, whole: bool) -> str:
    """As :func:`text_or_none`, with an error where it is not text."""
    text = text_or_none(file, limit, whole=whole)
    if text is None:
        raise binary(file)
    return text


def binary(file: Path) -> ValueError:
    """The error for a file that is not text."""
    return ValueError(
        f"corpus must be UTF-8 text, got a binary file (NUL bytes or undecodable as UTF-8): {file}; "
        "text of another encoding has to be converted first, for example by iconv"
    )


def decode(data: bytes, *, is_whole: bool = True) -> str | None:
    """The text of `data` with lines ending in a newline alone, or None where it is not text.

    What may be half of a character or line end is left out where `data` is not the whole.
    """
    if b"\0" in data:
        return None
    try:
        text = codecs.getincrementaldecoder("utf-8-sig")().decode(data, final=is_whole)
    except UnicodeDecodeError:
        return None
    return (text if is_whole else text.removesuffix("\r")).replace("\r\n", "\n")


def _read_bytes(file: Path, most: int | None) -> tuple[bytes, bool]:
    """The unpacked content, of a compressed file at most that many bytes, and whether it is all."""
    # Reading a pipe or a device would not end.
    if file.exists() and not file.is_file():
        raise ValueError(f"corpus must be regular files, got a pipe or a device: {file}")
    try:
        if file.suffix not in OPEN_COMPRESSED:
            return file.read_bytes(), True
        with OPEN_COMPRESSED[file.suffix](file) as unpacked:
            data: bytes = unpacked.read() if most is None else unpacked.read(most + 1)
    except (OSError, *_DECOMPRESSION_ERRORS) as error:
        raise ValueError(f"corpus must be readable files, got {file}: {error}") from error
    return data[:most], most is None or len(data) <= most
