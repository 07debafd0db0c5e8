"""Text out of files that may be compressed, no more of it than is asked for."""

import bz2
import gzip
import lzma
import re
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO

__all__ = ["OPEN_COMPRESSED", "NotTextError", "read_text"]

OPEN_COMPRESSED: dict[str, Callable[..., Any]] = {".xz": lzma.open, ".gz": gzip.open, ".bz2": bz2.open}
# Unpacked bytes of a file that is cut in proportion to its length, so that a limit on its parts does not limit it:
# this many, or this many times the limit.
_MOST_UNPACKED, _MOST_TIMES = 2**26, 100
# Characters that are read at once of a line.
_PIECE = 2**20
_WIKI_EXTRACTOR_START = re.compile(r"^<doc id=", re.MULTILINE)
_WIKI_EXTRACTOR_LINE = re.compile(r"^(?:<doc [^\n]*>|</doc>)[ \t]*(?:\n|\Z)", re.MULTILINE)


class NotTextError(ValueError):
    """A file is not UTF-8 text."""


def read_text(file: Path, limit: int | None = None, *, whole: bool = True) -> str:
    r"""The text of a file, its lines ending in "\n", without those that WikiExtractor adds.

    Args:
        file: UTF-8 text of any suffix; ``.xz``, ``.gz`` and ``.bz2`` are unpacked.
        limit: UTF-8 bytes that will be used of it, or of each of its parts; None for all.
        whole: Whether it is needed whole, for parts in proportion to its length. Otherwise a compressed file is
            unpacked as far as its first ``limit`` bytes of text take.

    Raises:
        NotTextError: If it is not text.
        ValueError: If it cannot be read, is a pipe or a device, or unpacks to more than the most.
    """
    # Reading a pipe or a device would not end.
    if file.exists() and not file.is_file():
        raise ValueError(f"corpus must be regular files, got a pipe or a device: {file}")
    is_packed = file.suffix in OPEN_COMPRESSED
    try:
        with OPEN_COMPRESSED.get(file.suffix, open)(file, "rt", encoding="utf-8-sig", newline="\n") as opened:
            text = (
                opened.read()
                if limit is None or not is_packed
                else "".join(_beginning(opened, file, limit, whole=whole))
            )
    except (OSError, lzma.LZMAError, zlib.error, EOFError) as error:
        raise ValueError(f"corpus must be readable files, got {file}: {error}") from error
    except UnicodeDecodeError:
        text = "\0"
    if "\0" in text:
        raise NotTextError(
            f"corpus must be UTF-8 text, got a binary file (NUL bytes or undecodable as UTF-8): {file}; "
            "text of another encoding has to be converted first, for example by iconv"
        )
    text = text.replace("\r\n", "\n")
    return _WIKI_EXTRACTOR_LINE.sub("", text) if _WIKI_EXTRACTOR_START.search(text) else text


def _beginning(opened: TextIO, file: Path, limit: int, *, whole: bool) -> Iterator[str]:
    """Lines with at least ``limit`` bytes of text among them, or all."""
    found, unpacked, most = 0, 0, max(_MOST_UNPACKED, _MOST_TIMES * limit)
    while (whole or found < limit) and (piece := opened.readline(_PIECE)):
        yield piece
        size = len(piece.encode())
        unpacked += size
        # The end of a line may lose a byte.
        found += 0 if _WIKI_EXTRACTOR_LINE.match(piece.rstrip()) else size - 1
        if unpacked > most:
            raise ValueError(
                f"corpus must be files that unpack to at most {most:,} bytes where max_bytes is given, got more from "
                f"{file}: unpack it, raise max_bytes, or name files by the splits"
            )
