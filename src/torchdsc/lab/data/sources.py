"""Where a corpus's text comes from: the standard library, the hub, or local files; each gives three raw splits."""

import hashlib
import logging
import os
import re
import sysconfig
from collections.abc import Iterable, Iterator
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from .hub import load_hub
from .text_files import OPEN_COMPRESSED, NotTextError, read_text

__all__ = ["SplitTexts", "read_embedded", "read_local", "read_wikitext"]

_WORDS_OF_SPLIT = {"train": ("train", "training"), "valid": ("valid", "validation", "val", "dev"), "test": ("test",)}
_SPLIT_OF_WORD = {word: split for split, words in _WORDS_OF_SPLIT.items() for word in words}
# Source code is full of names such as test_io.py and train.py, which say nothing about splits.
_CODE_SUFFIXES = frozenset(
    (".py", ".pyi", ".c", ".h", ".cc", ".cpp", ".hpp", ".cu", ".js", ".ts", ".go", ".rs", ".java", ".sh", ".rb", ".jl")
)
# In a folder without splits, a file of these suffixes has to be text; any other that is not text is passed over.
_TEXT_SUFFIXES = frozenset((".txt", ".text", ".raw", ".tokens", ".md", ".rst"))
# Folders beside the standard library's source: installed packages, and one machine's build.
_NOT_OF_THE_LIBRARY = re.compile("(site-packages|dist-packages|__pycache__)$|config-")
_TRAIN_FRACTION, _VALID_FRACTION = 0.90, 0.05
_THREE_SPLITS = (_TRAIN_FRACTION, _TRAIN_FRACTION + _VALID_FRACTION)

_logger = logging.getLogger(__name__)


class SplitTexts(NamedTuple):
    """The text of the three splits."""

    train: str
    valid: str
    test: str


def read_embedded() -> SplitTexts:
    """Read the Python standard library's source, split by file: 90/5/5 by a hash of the relative path.

    The test suites belong to it where they are installed: they are most of the text. Left out are installed packages,
    the files that describe one machine's build, and the few files that are not UTF-8 by intent. Files are ordered by
    that hash, so that the beginning of a split is like the rest of it.

    Raises:
        ValueError: If this Python keeps no standard library source on disk.
    """
    root = Path(sysconfig.get_path("stdlib"))
    hashed = {hashlib.sha256(name.encode()).digest(): name for name in _stdlib_files(root)}
    parts: dict[str, list[str]] = {split: [] for split in SplitTexts._fields}
    for digest in sorted(hashed):
        # The last bytes, because the first ones order the files.
        position = int.from_bytes(digest[-8:], "big") / 2**64
        split = SplitTexts._fields[sum(position >= end for end in _THREE_SPLITS)]
        with suppress(NotTextError):
            parts[split].append(read_text(root / hashed[digest]))
    if not any(parts.values()):
        raise ValueError(f"corpus 'embedded' needs the standard library's source files, got none in {root}")
    return SplitTexts(*map(_join, parts.values()))


def _stdlib_files(root: Path) -> Iterator[str]:
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if not _NOT_OF_THE_LIBRARY.match(name)]
        for name in names:
            if name.endswith(".py") and not name.startswith("_sysconfigdata"):
                yield (Path(folder) / name).relative_to(root).as_posix()


def read_wikitext(name: str) -> SplitTexts:
    """Read the raw form of "wikitext-2" or "wikitext-103" from the hub, line by line as it was published.

    Raises:
        ImportError: If ``datasets`` is not installed.
        OSError: If the download failed.
    """
    parts = (load_hub(f"Salesforce/wikitext/{name}-raw-v1:{split}") for split in ("train", "validation", "test"))
    return SplitTexts(*(_join(part["text"]) for part in parts))


def read_local(path: Path, *, limit: int | None = None) -> SplitTexts:
    """Read a file or a folder of text files; :func:`load_corpus` says how the splits are found.

    Args:
        path: An existing file or folder.
        limit: UTF-8 bytes at the beginning of each split that will be used, None for all.

    Returns:
        The splits, right in their first ``limit`` bytes; any of them may be empty.

    Raises:
        ValueError: If a file is unusable, as :func:`read_text` says; or the folder has no text files, or held-out
            splits but no train.
    """
    if not path.is_dir():
        return SplitTexts(*_cut(read_text(path, limit), *_THREE_SPLITS))
    files = _find_splits(path)
    if not files:
        return SplitTexts(*_cut(_read_folder(path, limit), *_THREE_SPLITS))
    names = {split: [file.name for file in members] for split, members in files.items()}
    if "train" not in files:
        raise ValueError(
            f"corpus must be a folder with a train part when its files are named after splits, got {names} in {path}"
        )
    # What lacks is cut out of these.
    divided = "train" if "valid" not in files else "valid" if "test" not in files else ""
    texts = {
        split: _join(read_text(file, limit, whole=split == divided) for file in members)
        for split, members in files.items()
    }
    _logger.info("%s: splits from %s", path, names)
    if len(texts) == 1:
        return SplitTexts(*_cut(texts["train"], *_THREE_SPLITS))
    if "valid" not in texts:
        texts["train"], texts["valid"] = _cut(texts["train"], 1 - _VALID_FRACTION)
    elif "test" not in texts:
        texts["valid"], texts["test"] = _cut(texts["valid"], 0.5)
    return SplitTexts(**texts)


def _find_splits(folder: Path) -> dict[str, list[Path]]:
    """The files of each split that the names at the top of a folder tell; none where they tell nothing."""
    members: dict[str, list[Path]] = {}
    # Files before folders.
    for path in sorted(_listed(folder), key=Path.is_dir):
        name = path.name.lower()
        words = [name] if path.is_dir() else [] if path.suffix in _CODE_SUFFIXES else re.split("[^a-z]+", name)
        named = {_SPLIT_OF_WORD[word] for word in words if word in _SPLIT_OF_WORD}
        if len(named) == 1:
            members.setdefault(named.pop(), []).append(path)
    # Without a train beside it, a subfolder "test" is more likely a project's tests.
    if "train" not in members and all(path.is_dir() for paths in members.values() for path in paths):
        return {}
    return {split: [file for path in paths for file in _walk(path)] for split, paths in members.items()}


def _read_folder(folder: Path, limit: int | None) -> str:
    """All text files under a folder, joined in sorted order."""
    texts = []
    for file in _walk(folder):
        try:
            texts.append(read_text(file, limit))
        except NotTextError:
            if _plain_name(file).suffix.lower() in _TEXT_SUFFIXES:
                raise
            _logger.info("%s is not text: passed over", file)
    if not texts:
        raise ValueError(f"corpus must be a folder with text files, got none in {folder}")
    return _join(texts)


def _walk(path: Path) -> list[Path]:
    """A file, or those under a folder, sorted; of ``train.txt`` and ``train.txt.xz`` the plain one."""
    if not path.is_dir():
        return [path]
    # A linked folder may lead back up.
    members = [member for member in _listed(path) if not (member.is_dir() and member.is_symlink())]
    return [file for member in members for file in _walk(member)]


def _listed(folder: Path) -> list[Path]:
    """What lies in a folder, sorted, but neither hidden names, nor pipes, nor the packed twin of another file.

    A dangling link is listed, so that reading it complains.
    """
    try:
        entries = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    except OSError as error:
        raise ValueError(f"corpus must be a readable folder, got {folder}: {error}") from error
    chosen: dict[Path, Path] = {}
    for path in entries:
        if path.is_file() or path.is_dir() or path.is_symlink():
            # Twins together would double the text; a plain one comes first.
            chosen.setdefault(_plain_name(path), path)
    return list(chosen.values())


def _plain_name(path: Path) -> Path:
    return path.with_suffix("") if path.suffix in OPEN_COMPRESSED and not path.is_dir() else path


def _join(texts: Iterable[str]) -> str:
    """Join files or lines, giving a newline to each that does not end in one."""
    return "".join(text if text.endswith("\n") else f"{text}\n" for text in texts)


def _cut(text: str, *fractions: float) -> list[str]:
    """The parts of a text between the line boundaries nearest before these fractions of it."""
    places = [0]
    for fraction in fractions:
        places.append(_boundary(text, int(len(text) * fraction), start=places[-1]))
    return [text[start:end] for start, end in pairwise([*places, len(text)])]


def _boundary(text: str, position: int, start: int) -> int:
    """The last line boundary in start < boundary <= position; a word's, or ``position`` itself, where there is none."""
    for mark in ("\n", " "):
        found = text.rfind(mark, start, position)
        if found >= 0:
            return found + 1
    return position
