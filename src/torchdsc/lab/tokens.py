"""From text to training windows: token files in a cache, and the datasets that cut windows out of them."""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import torch
from tokenizers import Tokenizer
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm  # type: ignore[import-untyped]
from transformers import PreTrainedTokenizerFast

from torchdsc.lab.corpora import Corpus
from torchdsc.lab.files import file_sha256, read_json, remove_drafts, write_atomically, write_json
from torchdsc.lab.tokenizers import content_hash, default_cache_dir, plain_backend

TokenArray = npt.NDArray[np.uint16] | npt.NDArray[np.uint32]

_SPLITS = ("train", "valid", "test")
# Part of the cache's key: raise it when the same text and tokenizer would give other files.
_FORMAT = 1
_CHECKSUMS = "sha256"
_CHUNK, _SEARCH, _BATCH = 2**14, 2**10, 64
_PUBLISHED_FRACTION = 0.9
# Between two printable ASCII characters, where a tokenizer that splits at spaces joins nothing.
_SAFE_CUT = re.compile(r"(?<=[!-~])(?= [!-~])")
_LINE_CUT = re.compile("\n")

_MASK = 2**64 - 1
_GOLDEN = 0x9E3779B97F4A7C15

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TokenSplits:
    """The tokens of a corpus.

    Attributes:
        train: token ids of shape (num_tokens,), uint16 or uint32, memory-mapped and read-only.
        valid: likewise.
        test: likewise.
        vocab_size: ids are below this; what an embedding needs at least.
    """

    train: TokenArray
    valid: TokenArray
    test: TokenArray
    vocab_size: int


def tokenize_corpus(
    corpus: Corpus,
    tokenizer: PreTrainedTokenizerFast,
    *,
    cache_dir: Path | None = None,
    progress: bool = True,
) -> TokenSplits:
    """Encodes the three splits of a corpus, once: later calls map the files of the first, if their checksums hold.

    A text is encoded in pieces of some 16,000 characters, cut before a space inside a line (after a line where there is
    no such space, anywhere where there is no line). A byte-level tokenizer that splits at spaces, as GPT-2's and the
    lab's own do, gives the tokens of the whole text in this way; one that marks the beginning of a text marks that of
    each piece. Where the corpus was prepared as "published", train is its first 90 % of tokens and valid its last 10 %.

    Args:
        corpus: the text.
        tokenizer: any fast tokenizer; special tokens written out in the text become those tokens, none is added.
        cache_dir: where the token files are kept, by content of corpus and tokenizer; None is `default_cache_dir()`.
        progress: whether to show a bar with the time left while encoding, where there is a terminal.

    Returns:
        The tokens, as uint16 where the vocabulary has at most 65,536 entries and as uint32 otherwise.

    Raises:
        ValueError: the tokenizer gives no token for one of the splits.
        OSError: the cache cannot be written.
    """
    key = hashlib.sha256(f"{_FORMAT}:{corpus.sha256}:{content_hash(tokenizer)}".encode()).hexdigest()
    folder = (cache_dir or default_cache_dir()) / "tokens" / key
    for place in folder.parent.glob("*/"):
        remove_drafts(place)
    backend = plain_backend(tokenizer)
    vocab_size = 1 + max(backend.get_vocab(with_added_tokens=True).values())
    dtype = np.dtype("<u2" if vocab_size <= 2**16 else "<u4")
    counts = _complete_counts(folder, dtype)
    if counts is None:
        counts = _encode_splits(corpus, backend, folder, dtype, progress=progress)
    tokens: dict[str, TokenArray] = {
        split: np.memmap(folder / f"{split}.bin", dtype=dtype, mode="r", shape=(counts[split],)) for split in _SPLITS
    }
    if corpus.preparation == "published":
        tokens["train"] = tokens["train"][: int(_PUBLISHED_FRACTION * counts["train"])]
        tokens["valid"] = tokens["valid"][int(_PUBLISHED_FRACTION * counts["valid"]) :]
    return TokenSplits(**tokens, vocab_size=vocab_size)


def _complete_counts(folder: Path, dtype: np.dtype[Any]) -> dict[str, int] | None:
    """The tokens in each split's file, or None where the cache is absent, or another than was written."""
    file = folder / "counts.json"
    if not file.is_file():
        return None
    try:
        counts = read_json(file, keys=(*_SPLITS, _CHECKSUMS))
        sizes = {split: (folder / f"{split}.bin").stat().st_size for split in _SPLITS}
        is_whole = sizes == {split: counts[split] * dtype.itemsize for split in _SPLITS}
        # A file of the right size may hold anything, as after a crash of the file system.
        if is_whole and _checksums(folder) == counts[_CHECKSUMS]:
            return {split: counts[split] for split in _SPLITS}
        reason = "its files differ from counts.json"
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError) as error:
        reason = str(error)
    _logger.warning("%s is damaged or of an older version (%s): encoding the corpus again", folder, reason)
    return None


def _checksums(folder: Path) -> dict[str, str]:
    return {split: file_sha256(folder / f"{split}.bin") for split in _SPLITS}


def _encode_splits(
    corpus: Corpus, backend: Tokenizer, folder: Path, dtype: np.dtype[Any], *, progress: bool
) -> dict[str, int]:
    texts = {split: getattr(corpus, split) for split in _SPLITS}
    counts = {}
    characters = sum(map(len, texts.values()))
    # For tqdm None is "only on a terminal".
    shown = None if progress else True
    with tqdm(total=characters, desc=f"tokenizing {corpus.name}", unit="char", unit_scale=True, disable=shown) as bar:
        for split, text in texts.items():

            def write(file: BinaryIO, split: str = split, text: str = text) -> None:
                counts[split] = _encode(text, backend, file, dtype, bar)

            write_atomically(folder / f"{split}.bin", write)
            if counts[split] == 0:
                raise ValueError(f"tokenizer must give tokens for every split, got none for {split} of {corpus.name}")
    # Written last: without it the files beside it do not count as complete.
    write_json(folder / "counts.json", {**counts, _CHECKSUMS: _checksums(folder)})
    return counts


def _encode(text: str, backend: Tokenizer, file: BinaryIO, dtype: np.dtype[Any], bar: Any) -> int:
    """Appends the tokens of `text` to `file`; returns how many they are."""
    count = 0
    pieces = _pieces(text)
    while batch := list(islice(pieces, _BATCH)):
        for encoding in backend.encode_batch_fast(batch, add_special_tokens=False):
            ids = np.array(encoding.ids, dtype=dtype)
            file.write(ids.tobytes())
            count += len(ids)
        bar.update(sum(map(len, batch)))
    return count


def _pieces(text: str) -> Iterator[str]:
    """Cuts a text into pieces of about `_CHUNK` characters that are encoded on their own."""
    start = 0
    while len(text) - start > _CHUNK + _SEARCH:
        target = start + _CHUNK
        found = _SAFE_CUT.search(text, target, target + _SEARCH) or _LINE_CUT.search(text, target, target + _SEARCH)
        end = found.end() if found else target
        yield text[start:end]
        start = end
    if start < len(text):
        yield text[start:]


class RandomWindows(Dataset[dict[str, Tensor]]):
    """Windows at random places, each of which depends on the seed and its index alone.

    A training that stops and goes on therefore sees the same windows as one that does not, and the number of workers
    changes nothing. Any index is drawn from every place at which a window fits, with equal probability.

    Args:
        tokens: token ids of shape (num_tokens,), any integer dtype.
        length: tokens in a window.
        num_samples: windows in the dataset.
        seed: of the places.

    Raises:
        TypeError: `tokens` is not an array of integers.
        ValueError: `tokens` is not one-dimensional or is shorter than `length + 1`, or `length` or `num_samples` is
            less than 1.
    """

    def __init__(self, tokens: npt.NDArray[Any], length: int, num_samples: int, seed: int) -> None:
        self._tokens = _checked(tokens, length)
        _check_positive("num_samples", num_samples)
        self._length = length
        self._num_samples = num_samples
        self._places = len(tokens) - length
        self._key = _mix(_mix(int(seed)) + _GOLDEN)

    def __len__(self) -> int:
        return self._num_samples

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Cuts out window `index`.

        Args:
            index: from 0 to `len(self) - 1`, or counted from the end when negative.

        Returns:
            `input_ids`, `labels` (the same ids) and `shift_labels` (at each place the next token), each of shape
            (length,) and dtype int64, sharing no memory.

        Raises:
            IndexError: `index` is out of range.
        """
        draw = _mix(self._key + _normalized(index, self._num_samples) * _GOLDEN)
        # The high half of draw * places is uniform over the places; its bias is below places / 2**64.
        return _window(self._tokens, (draw * self._places) >> 64, self._length)


class FixedWindows(Dataset[dict[str, Tensor]]):
    """Windows side by side from the first token on: each token is predicted at most once.

    Args:
        tokens: token ids of shape (num_tokens,), any integer dtype.
        length: tokens in a window.
        max_windows: how many of the windows that fit to keep, evenly spaced over the tokens; None keeps all.

    Raises:
        TypeError: `tokens` is not an array of integers.
        ValueError: `tokens` is not one-dimensional or is shorter than `length + 1`, or `length` or `max_windows` is
            less than 1.
    """

    def __init__(self, tokens: npt.NDArray[Any], length: int, max_windows: int | None = None) -> None:
        self._tokens = _checked(tokens, length)
        self._length = length
        # The last window needs one token more, the label of its last place.
        self._fitting = (len(tokens) - 1) // length
        if max_windows is not None:
            _check_positive("max_windows", max_windows)
        self._num_windows = self._fitting if max_windows is None else min(max_windows, self._fitting)

    def __len__(self) -> int:
        return self._num_windows

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Cuts out window `index`.

        Args:
            index: from 0 to `len(self) - 1`, or counted from the end when negative.

        Returns:
            As `RandomWindows` does.

        Raises:
            IndexError: `index` is out of range.
        """
        place = _normalized(index, self._num_windows) * self._fitting // self._num_windows
        return _window(self._tokens, place * self._length, self._length)


def _checked(tokens: npt.NDArray[Any], length: int) -> npt.NDArray[Any]:
    if not isinstance(tokens, np.ndarray) or not np.issubdtype(tokens.dtype, np.integer):
        received = getattr(tokens, "dtype", type(tokens).__name__)
        raise TypeError(f"tokens must be a numpy array of integers, got {received}")
    if tokens.ndim != 1:
        raise ValueError(f"tokens must have shape (num_tokens,), got {tokens.shape}")
    _check_positive("length", length)
    if len(tokens) < length + 1:
        raise ValueError(
            f"tokens must hold at least one window of length {length} and the token after it "
            f"({length + 1} tokens), got a split of {len(tokens)} tokens"
        )
    # The plain view of a memory map slices several times faster than the map itself.
    return tokens.view(np.ndarray)


def _check_positive(name: str, value: int) -> None:
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")


def _normalized(index: int, size: int) -> int:
    index = int(index)
    if not -size <= index < size:
        raise IndexError(f"index must be in [-{size}, {size}), got {index}")
    return index % size


def _window(tokens: npt.NDArray[Any], start: int, length: int) -> dict[str, Tensor]:
    # Each has memory of its own, so that a change of one in place changes no other.
    inputs = tokens[start : start + length].astype(np.int64)
    following = tokens[start + 1 : start + length + 1].astype(np.int64)
    return {
        "input_ids": torch.from_numpy(inputs),
        "labels": torch.from_numpy(inputs.copy()),
        "shift_labels": torch.from_numpy(following),
    }


def _mix(value: int) -> int:
    """The finalizer of SplitMix64 (Steele, Lea and Flood 2014): a bijection of 64 bits that scatters neighbours."""
    value &= _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)
