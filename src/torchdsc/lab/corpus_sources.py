"""Where a corpus's text comes from: the standard library, the hub, or local files; each gives three raw splits."""

from __future__ import annotations

import hashlib
import importlib
import logging
import os
import re
import sysconfig
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from torchdsc.lab.text_files import OPEN_COMPRESSED, binary, decode, read_text, text_or_none

HUB_CONFIGURATIONS = {"wikitext-2": "wikitext-2-raw-v1", "wikitext-103": "wikitext-103-raw-v1"}
_HUB_REPOSITORY = "Salesforce/wikitext"

_SPLIT_OF_WORD = {
    "train": "train",
    "training": "train",
    "valid": "valid",
    "validation": "valid",
    "val": "valid",
    "dev": "valid",
    "test": "test",
}
# Source code is full of names such as test_io.py and train.py, which say nothing about splits.
_CODE_SUFFIXES = frozenset(
    (".py", ".pyi", ".c", ".h", ".cc", ".cpp", ".hpp", ".cu", ".js", ".ts", ".go", ".rs", ".java", ".sh", ".rb", ".jl")
)
# In a folder without splits, a file of these suffixes has to be text; any other that is not text is passed over.
_TEXT_SUFFIXES = frozenset((".txt", ".text", ".raw", ".tokens", ".md", ".rst"))
_TRAIN_FRACTION, _VALID_FRACTION = 0.90, 0.05

_logger = logging.getLogger(__name__)


class SplitTexts(NamedTuple):
    """The text of the three splits."""

    train: str
    valid: str
    test: str


def read_embedded() -> SplitTexts:
    """Reads the Python standard library's source, split by file: 90/5/5 by a hash of the relative path.

    The test suites belong to it where they are installed: they are most of the text. Left out are installed packages,
    the files that describe one machine's build, and the few files that are not UTF-8 by intent. Files are ordered by
    that hash, so that the beginning of a split is like the rest of it.

    Returns:
        The splits, each file ending in a newline.

    Raises:
        ValueError: this Python keeps no standard library source on disk.
    """
    root = Path(sysconfig.get_path("stdlib"))
    hashed = {hashlib.sha256(relative.encode()).digest(): relative for relative in _stdlib_files(root)}
    parts: dict[str, list[str]] = {"train": [], "valid": [], "test": []}
    for digest in sorted(hashed):
        text = decode((root / hashed[digest]).read_bytes())
        if text is None:
            continue
        # The last bytes, because the first ones order the files.
        position = int.from_bytes(digest[-8:], "big") / 2**64
        held_out = "valid" if position < _TRAIN_FRACTION + _VALID_FRACTION else "test"
        parts["train" if position < _TRAIN_FRACTION else held_out].append(text)
    if not any(parts.values()):
        raise ValueError(f"corpus 'embedded' needs the standard library's source files, got none in {root}")
    return SplitTexts(*(_join(parts[split]) for split in SplitTexts._fields))


def _stdlib_files(root: Path) -> list[str]:
    files = []
    for folder, subfolders, names in os.walk(root):
        excluded = {"site-packages", "dist-packages", "__pycache__"}
        subfolders[:] = [name for name in subfolders if name not in excluded and not name.startswith("config-")]
        files += [
            (Path(folder) / name).relative_to(root).as_posix()
            for name in names
            if name.endswith(".py") and not name.startswith("_sysconfigdata")
        ]
    return files


def read_hub(name: str) -> SplitTexts:
    """Reads the raw form of a public corpus through `datasets`, line by line as it was published.

    Args:
        name: a key of `HUB_CONFIGURATIONS`.

    Returns:
        The splits as published.

    Raises:
        ImportError: `datasets` is not installed.
        OSError: the download failed.
    """
    try:
        datasets = importlib.import_module("datasets")
    except ImportError as error:
        raise ImportError(
            f"corpus {name!r} is loaded through `datasets`, which is not installed: pip install 'torchdsc[corpora]', "
            "or give a folder with its files as the corpus"
        ) from error
    try:
        splits = datasets.load_dataset(_HUB_REPOSITORY, HUB_CONFIGURATIONS[name])
        rows = [splits[split]["text"] for split in ("train", "validation", "test")]
    # The hub's clients raise errors of several unrelated families; all mean that the corpus is not to be had.
    except Exception as error:
        raise OSError(
            f"corpus {name!r} could not be downloaded ({type(error).__name__}: {error}); "
            "a folder with its files can be given instead, such as ./wikitext-2"
        ) from error
    return SplitTexts(*(_join(lines) for lines in rows))


def read_local(path: Path, *, limit: int | None = None) -> SplitTexts:
    """Reads a file or a folder of text files; `load_corpus` says how the splits are found.

    Args:
        path: an existing file or folder.
        limit: UTF-8 bytes at the beginning of each split that will be used, None for all. Compressed files are
            unpacked no further than that where they are a split of their own; where they are cut in proportion to
            their length, to 64 MiB or 100 times the limit at most.

    Returns:
        The splits, right in their first `limit` bytes; any of them may be empty.

    Raises:
        ValueError: a file cannot be read, is a pipe or a device, is not text, or unpacks to more than the most; the
            folder has no text files, or it has held-out splits but no train.
    """
    if not path.is_dir():
        return _split_contiguously(read_text(path, limit, whole=True))
    files = _find_splits(path)
    if not files:
        return _split_contiguously(_read_folder(path, limit))
    if "train" not in files:
        found = {split: [file.name for file in members] for split, members in files.items()}
        raise ValueError(
            f"corpus must be a folder with a train part when its files are named after splits, got {found} in {path}"
        )
    # What lacks is cut out of these.
    divided = "train" if "valid" not in files else "valid" if "test" not in files else ""
    texts = {
        split: _join(read_text(file, limit, whole=split == divided) for file in members)
        for split, members in files.items()
    }
    _logger.info("%s: splits from %s", path, {split: [file.name for file in files[split]] for split in files})
    if "valid" in texts and "test" not in texts:
        middle = _boundary(texts["valid"], len(texts["valid"]) // 2)
        texts["valid"], texts["test"] = texts["valid"][:middle], texts["valid"][middle:]
    elif "valid" not in texts and "test" in texts:
        cut = _boundary(texts["train"], int(len(texts["train"]) * (1 - _VALID_FRACTION)))
        texts["train"], texts["valid"] = texts["train"][:cut], texts["train"][cut:]
    elif "valid" not in texts:
        return _split_contiguously(texts["train"])
    return SplitTexts(**texts)


def _find_splits(folder: Path) -> dict[str, list[Path]]:
    """The files of each split that the names at the top of `folder` tell; none where they tell nothing."""
    members = [path for path in _listed(folder) if path.suffix not in _CODE_SUFFIXES or path.is_dir()]
    files: dict[str, list[Path]] = {}
    for file in _without_compressed_twins(path for path in members if not path.is_dir()):
        named = {_SPLIT_OF_WORD[word] for word in re.split("[^a-z]+", file.name.lower()) if word in _SPLIT_OF_WORD}
        if len(named) == 1:
            files.setdefault(named.pop(), []).append(file)
    subfolders = [path for path in members if path.is_dir() and path.name.lower() in _SPLIT_OF_WORD]
    # Without a train beside it, a subfolder `test` is more likely a project's tests.
    if files or any(_SPLIT_OF_WORD[path.name.lower()] == "train" for path in subfolders):
        for subfolder in subfolders:
            found = _without_compressed_twins(_walk(subfolder))
            files.setdefault(_SPLIT_OF_WORD[subfolder.name.lower()], []).extend(found)
    return files


def _read_folder(folder: Path, limit: int | None) -> str:
    """All text files under `folder`, joined in sorted order."""
    texts = []
    for file in _without_compressed_twins(_walk(folder)):
        text = text_or_none(file, limit, whole=True)
        if text is not None:
            texts.append(text)
        elif _plain_name(file).suffix.lower() in _TEXT_SUFFIXES:
            raise binary(file)
        else:
            _logger.info("%s is not text: passed over", file)
    if not texts:
        raise ValueError(f"corpus must be a folder with text files, got none in {folder}")
    return _join(texts)


def _listed(folder: Path) -> list[Path]:
    """What lies in `folder`, hidden names apart, sorted; a dangling link is listed, so that reading it complains."""
    try:
        entries = sorted(folder.iterdir())
    except OSError as error:
        raise ValueError(f"corpus must be a readable folder, got {folder}: {error}") from error
    return [path for path in entries if not path.name.startswith(".") and _is_file_folder_or_link(path)]


def _is_file_folder_or_link(path: Path) -> bool:
    return path.is_file() or path.is_dir() or path.is_symlink()


def _walk(folder: Path) -> list[Path]:
    files: list[Path] = []
    for path in _listed(folder):
        if not path.is_dir():
            files.append(path)
        # A linked folder may lead back up.
        elif not path.is_symlink():
            files += _walk(path)
    return files


def _plain_name(file: Path) -> Path:
    return file.with_suffix("") if file.suffix in OPEN_COMPRESSED else file


def _without_compressed_twins(files: Iterable[Path]) -> list[Path]:
    """Keeps one of `train.txt` and `train.txt.xz`, the plain one: both together would double the text."""
    chosen: dict[Path, Path] = {}
    for file in files:
        if file.suffix not in OPEN_COMPRESSED or _plain_name(file) not in chosen:
            chosen[_plain_name(file)] = file
    return list(chosen.values())


def _join(texts: Iterable[str]) -> str:
    """Joins files or lines, giving a newline to each that does not end in one."""
    return "".join(text if text.endswith("\n") else f"{text}\n" for text in texts)


def _split_contiguously(text: str) -> SplitTexts:
    first = _boundary(text, int(len(text) * _TRAIN_FRACTION))
    second = _boundary(text, int(len(text) * (_TRAIN_FRACTION + _VALID_FRACTION)), start=first)
    return SplitTexts(text[:first], text[first:second], text[second:])


def _boundary(text: str, position: int, start: int = 0) -> int:
    """The last line boundary in start < boundary <= position; a word's, or `position` itself, where there is none."""
    for mark in ("\n", " "):
        found = text.rfind(mark, start, position)
        if found >= 0:
            return found + 1
    return position
