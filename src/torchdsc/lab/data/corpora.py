"""Corpora to train and compare on: the embedded one, public ones and local files, in three prepared splits."""

import hashlib
import os
import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

from torchdsc.lab.files import expand

from .sources import SplitTexts, read_embedded, read_local, read_wikitext

__all__ = ["Corpus", "Preparation", "load_corpus"]

Preparation = Literal["plain", "published"]

_WIKITEXT = ("wikitext-2", "wikitext-103")
_PUBLISHED_BYTES = 20_000_000
_PUBLISHED_MIN_CHARACTERS = 10
_PUBLISHED_CALC_PROBABILITY = 0.15


@dataclass(frozen=True)
class Corpus:
    """Three prepared splits of text, identified by their content.

    Attributes:
        name: What was loaded, without its place: "embedded", "wikitext-2", or the last part of a path.
        sha256: Hex digest over the three prepared splits; any change of text or of preparation changes it.
        train: The text to train on.
        valid: The text to choose by.
        test: The text to report on.
        preparation: How the text was prepared. :func:`tokenize_corpus` reads it, because the published preparation
            ends with a cut that is counted in tokens.
    """

    name: str
    sha256: str
    train: str = field(repr=False)
    valid: str = field(repr=False)
    test: str = field(repr=False)
    preparation: Preparation = "plain"


def load_corpus(
    spec: str | os.PathLike[str] = "embedded", *, preparation: Preparation = "plain", max_bytes: int | None = None
) -> Corpus:
    """Load a corpus and prepare its three splits.

    Args:
        spec: One of

            * "embedded": the Python standard library's own source as found on this machine, with its test suites where
              they are installed: about 31 MB where whole, about 12 MB where a distribution left the tests out. Split by
              file, 90/5/5, by a hash of the file's relative path; the same on every machine with the same Python.
            * "wikitext-2", "wikitext-103": the raw form, downloaded through ``datasets``. Write "./wikitext-2" for a
              folder of that name.
            * a folder. Files at its top whose names hold one of the words train (training), valid (validation, val,
              dev) or test, such as ``wiki.train.tokens`` or ``valid-00001.txt.gz``, are the splits, as are subfolders
              of these names; other files are then left alone. Without a test part, the valid part is cut in halves;
              without a valid part, the last 5 % of train is taken. A folder that names no split (source code, such as
              ``test_io.py``, never does) is joined in sorted order, subfolders included, and cut as a single file is.
            * a single file, cut 90/5/5 at line boundaries.

            Paths may hold variables of the environment, "$DATA/wikitext-2". Files are UTF-8 text of any suffix;
            ``.xz``, ``.gz`` and ``.bz2`` are decompressed. The ``<doc ...>`` and ``</doc>`` lines of WikiExtractor are
            taken out.
        preparation: "plain" leaves the text as it is. "published" is the preparation of the paper's published run, for
            each split: its first 20,000,000 bytes; of these the lines longer than 10 characters; after each with
            probability 0.15 an added line ``Calc: a + b + c = sum`` with a, b, c uniform in 0..99. Its last step, first
            90 % of train's tokens and last 10 % of valid's, is taken by :func:`tokenize_corpus`.
        max_bytes: The most UTF-8 bytes to keep of each prepared split, 1 or more, cut at a line boundary at or under it
            (inside a line only where the first line alone is longer). Compressed files are unpacked no further than
            this asks for. One that is cut 90/5/5, or in halves, may unpack to 64 MiB or 100 times as much, and more is
            refused.

    Returns:
        The corpus. None of its splits is empty.

    Raises:
        ValueError: If an argument is none of the above; the corpus or one of its splits is empty; a folder has held-out
            splits but no train; a file is unreadable, a pipe or a device, or is not UTF-8 text.
        ImportError: If a hub corpus was asked for and ``datasets`` is not installed.
        OSError: If ``spec`` is a path that does not exist, or a hub corpus could not be downloaded.
    """
    if preparation not in get_args(Preparation):
        raise ValueError(f"preparation must be one of {get_args(Preparation)}, got {preparation!r}")
    if max_bytes is not None and max_bytes < 1:
        raise ValueError(f"max_bytes must be None or at least 1, got {max_bytes}")
    # What "published" leaves out is not known before.
    limit = _PUBLISHED_BYTES if max_bytes is not None and preparation == "published" else max_bytes
    name, texts = _read(os.fspath(spec), limit)
    if preparation == "published":
        texts = SplitTexts(*(_prepare_published(text, f"0:{index}") for index, text in enumerate(texts)))
    if max_bytes is not None:
        texts = SplitTexts(*(_truncate(text, max_bytes) for text in texts))
    digest = hashlib.sha256()
    for split, text in texts._asdict().items():
        if not text or text.isspace():
            raise ValueError(f"corpus must have text in every split, got an empty {split} split in {spec!r}")
        data = text.encode()
        # The length keeps text moved from one split to the next from giving the same digest.
        digest.update(len(data).to_bytes(8, "big"))
        digest.update(data)
    return Corpus(name, digest.hexdigest(), *texts, preparation)


def _read(spec: str, limit: int | None) -> tuple[str, SplitTexts]:
    if spec == "embedded":
        return spec, read_embedded()
    if spec in _WIKITEXT:
        return spec, read_wikitext(spec)
    path = Path(expand(spec)).expanduser()
    if spec.strip() and path.exists():
        return path.resolve().name, read_local(path, limit=limit)
    expected = f"corpus must be one of embedded, {', '.join(_WIKITEXT)}, or a path to text files"
    raise FileNotFoundError(f"{expected}, got a path that is not there: {spec}")


def _prepare_published(text: str, seed: str) -> str:
    """The text preparation of the paper's published run, up to its cut in tokens."""
    generator = random.Random(seed)
    lines = []
    for line in _first_bytes(text, _PUBLISHED_BYTES).split("\n"):
        if len(line) <= _PUBLISHED_MIN_CHARACTERS:
            continue
        lines.append(line)
        if generator.random() < _PUBLISHED_CALC_PROBABILITY:
            # random() alone is promised to stay the same over Python's versions, randrange is not.
            a, b, c = (int(generator.random() * 100) for _ in range(3))
            lines.append(f"Calc: {a} + {b} + {c} = {a + b + c}")
    return "".join(f"{line}\n" for line in lines)


def _first_bytes(text: str, limit: int) -> str:
    """The longest beginning of a text that takes at most ``limit`` bytes in UTF-8."""
    # A character takes at least one byte, so this bounds what has to be encoded.
    return text[:limit].encode()[:limit].decode(errors="ignore")


def _truncate(text: str, limit: int) -> str:
    """Cut a text at the last line boundary at or under ``limit`` bytes, or inside a first line that is longer."""
    head = _first_bytes(text, limit)
    if len(head) == len(text):
        return text
    return head[: head.rfind("\n") + 1] or head
