"""From text to training windows: token files in a cache, and the datasets that cut windows out of them."""

import hashlib
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

from torchdsc.lab.files import cache_folder, made_once, read_json, whole_folder, write_json

from .corpora import Corpus
from .tokenizers import content_hash, plain_backend

__all__ = ["FixedWindows", "RandomWindows", "ShuffledWindows", "TokenSplits", "tokenize_corpus"]

TokenArray = npt.NDArray[np.uint16] | npt.NDArray[np.uint32]

_SPLITS = ("train", "valid", "test")
# Part of the cache's key: raise it when the same text and tokenizer would give other files.
_FORMAT = 2
_CHECKSUMS = "sha256.json"
_CHUNK, _SEARCH, _BATCH = 2**14, 2**10, 64
_PUBLISHED_FRACTION = 0.9
# Between two printable ASCII characters, where a tokenizer that splits at spaces joins nothing.
_SAFE_CUT = re.compile(r"(?<=[!-~])(?= [!-~])")
_LINE_CUT = re.compile("\n")

_MASK = 2**64 - 1
_GOLDEN = 0x9E3779B97F4A7C15


@dataclass(frozen=True)
class TokenSplits:
    """The tokens of a corpus.

    Attributes:
        train: Token ids of shape (num_tokens,), uint16 or uint32, memory-mapped and read-only.
        valid: Likewise.
        test: Likewise.
        vocab_size: Ids are below this; what an embedding needs at least.
    """

    train: TokenArray
    valid: TokenArray
    test: TokenArray
    vocab_size: int


def tokenize_corpus(corpus: Corpus, tokenizer: PreTrainedTokenizerFast, *, progress: bool = True) -> TokenSplits:
    """Encode the three splits of a corpus, once: later calls map files of the cache, if their checksums hold.

    A text is encoded in pieces of some 16,000 characters, cut before a space inside a line (after a line where there is
    no such space, anywhere where there is no line). A byte-level tokenizer that splits at spaces, as GPT-2's and the
    lab's own do, gives the tokens of the whole text in this way; one that marks the beginning of a text marks that of
    each piece. Where the corpus was prepared as "published", train is its first 90 % of tokens and valid its last 10 %.

    Args:
        corpus: The text.
        tokenizer: Any fast tokenizer; special tokens written out in the text become those tokens, none is added.
        progress: Whether to show a bar with the time left while encoding, where there is a terminal.

    Returns:
        The tokens, as uint16 where the vocabulary has at most 65,536 entries and as uint32 otherwise.

    Raises:
        ValueError: If the tokenizer gives no token for one of the splits.
        OSError: If the cache cannot be written.
    """
    key = hashlib.sha256(f"{_FORMAT}:{corpus.sha256}:{content_hash(tokenizer)}".encode()).hexdigest()
    folder = cache_folder() / "tokens" / key
    backend = plain_backend(tokenizer)
    vocab_size = 1 + max(backend.get_vocab(with_added_tokens=True).values())
    dtype = np.dtype("<u2" if vocab_size <= 2**16 else "<u4")

    def read() -> dict[str, TokenArray]:
        if read_json(folder / _CHECKSUMS) != _checksums(folder):
            raise ValueError("a file of tokens is not what was written")
        return {split: np.memmap(folder / f"{split}.bin", dtype=dtype, mode="r") for split in _SPLITS}

    tokens = made_once(folder, read, lambda: _write(corpus, backend, folder, dtype, progress=progress))
    if corpus.preparation == "published":
        tokens["train"] = tokens["train"][: int(_PUBLISHED_FRACTION * len(tokens["train"]))]
        tokens["valid"] = tokens["valid"][int(_PUBLISHED_FRACTION * len(tokens["valid"])) :]
    return TokenSplits(**tokens, vocab_size=vocab_size)


def _checksums(folder: Path) -> dict[str, str]:
    sums = {}
    for split in _SPLITS:
        with (folder / f"{split}.bin").open("rb") as file:
            sums[split] = hashlib.file_digest(file, "sha256").hexdigest()
    return sums


def _write(corpus: Corpus, backend: Tokenizer, folder: Path, dtype: np.dtype[Any], *, progress: bool) -> None:
    """Encode the splits into a new folder."""
    texts = {split: getattr(corpus, split) for split in _SPLITS}
    characters = sum(map(len, texts.values()))
    # For tqdm None is "only on a terminal".
    shown = None if progress else True
    with (
        tqdm(total=characters, desc=f"tokenizing {corpus.name}", unit="char", unit_scale=True, disable=shown) as bar,
        whole_folder(folder) as draft,
    ):
        for split, text in texts.items():
            with (draft / f"{split}.bin").open("wb") as file:
                _encode(text, backend, file, dtype, bar)
                if not file.tell():
                    raise ValueError(
                        f"tokenizer must give tokens for every split, got none for {split} of {corpus.name}"
                    )
        write_json(draft / _CHECKSUMS, _checksums(draft))


def _encode(text: str, backend: Tokenizer, file: BinaryIO, dtype: np.dtype[Any], bar: Any) -> None:
    """Append the tokens of a text to a file."""
    pieces = _pieces(text)
    while batch := list(islice(pieces, _BATCH)):
        for encoding in backend.encode_batch_fast(batch, add_special_tokens=False):
            file.write(np.array(encoding.ids, dtype=dtype).tobytes())
        bar.update(sum(map(len, batch)))


def _pieces(text: str) -> Iterator[str]:
    """Cut a text into pieces of about ``_CHUNK`` characters that are encoded on their own."""
    start = 0
    while len(text) - start > _CHUNK + _SEARCH:
        target = start + _CHUNK
        found = _SAFE_CUT.search(text, target, target + _SEARCH) or _LINE_CUT.search(text, target, target + _SEARCH)
        end = found.end() if found else target
        yield text[start:end]
        start = end
    if start < len(text):
        yield text[start:]


class _Windows(Dataset[dict[str, Tensor]]):
    """Windows of ``length`` tokens, each with the token that follows it."""

    def __init__(self, tokens: npt.NDArray[Any], length: int, count: int) -> None:
        # The plain view of a memory map slices several times faster than the map itself.
        self._tokens, self._length, self._count = tokens.view(np.ndarray), length, count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """``input_ids``, ``labels`` (the same ids) and ``shift_labels`` (at each place the next token) of a window.

        Each is of shape (length,) and dtype int64, and they share no memory. A negative index counts from the end.

        Raises:
            IndexError: If the index is out of range.
        """
        index = int(index)
        if not -self._count <= index < self._count:
            raise IndexError(f"index must be in [-{self._count}, {self._count}), got {index}")
        start = self._start(index % self._count)
        window = torch.from_numpy(self._tokens[start : start + self._length + 1].astype(np.int64))
        return {"input_ids": window[:-1], "labels": window[:-1].clone(), "shift_labels": window[1:].clone()}

    def _start(self, index: int) -> int:
        """The place of a window's first token."""
        raise NotImplementedError


class RandomWindows(_Windows):
    """Windows at random places, each of which depends on the seed and its index alone.

    A training that stops and goes on therefore sees the same windows as one that does not, and the number of workers
    changes nothing. Any index is drawn from every place at which a window fits, with equal probability.

    Args:
        tokens: Token ids of shape (num_tokens,), any integer dtype.
        length: Tokens in a window, 1 or more.
        num_samples: Windows in the dataset, 1 or more.
        seed: Of the places.

    Raises:
        ValueError: If an argument is none of these, or ``tokens`` shorter than ``length + 1``.
    """

    def __init__(self, tokens: npt.NDArray[Any], length: int, num_samples: int, seed: int) -> None:
        _check(tokens, length, num_samples=num_samples)
        super().__init__(tokens, length, num_samples)
        self._places = len(tokens) - length
        self._key = _mix(_mix(int(seed)) + _GOLDEN)

    def _start(self, index: int) -> int:
        # The high half of draw * places is uniform over the places; its bias is below places / 2**64.
        return (_mix(self._key + index * _GOLDEN) * self._places) >> 64


class ShuffledWindows(_Windows):
    """Windows side by side in random order: no token is predicted twice.

    Args:
        tokens: Token ids of shape (num_tokens,), any integer dtype.
        length: Tokens in a window, 1 or more.
        num_samples: Windows in the dataset, 1 or more.
        seed: Of the order.

    Raises:
        ValueError: If an argument is none of these, or ``tokens`` has fewer such windows.
    """

    def __init__(self, tokens: npt.NDArray[Any], length: int, num_samples: int, seed: int) -> None:
        _check(tokens, length, num_samples=num_samples)
        super().__init__(tokens, length, num_samples)
        fitting = (len(tokens) - 1) // length
        if num_samples > fitting:
            raise ValueError(
                f"tokens must hold {num_samples:,} windows of length {length} that share none, got a split of "
                f"{len(tokens):,} tokens, which holds {fitting:,}"
            )
        self._order = torch.randperm(fitting, generator=torch.Generator().manual_seed(seed))[:num_samples].numpy()

    def _start(self, index: int) -> int:
        return int(self._order[index]) * self._length


class FixedWindows(_Windows):
    """Windows side by side from the first token on: each token is predicted at most once.

    Args:
        tokens: Token ids of shape (num_tokens,), any integer dtype.
        length: Tokens in a window, 1 or more.
        max_windows: How many of the windows that fit to keep, evenly spaced over the tokens, 1 or more; None keeps all.

    Raises:
        ValueError: If an argument is none of these, or ``tokens`` shorter than ``length + 1``.
    """

    def __init__(self, tokens: npt.NDArray[Any], length: int, max_windows: int | None = None) -> None:
        _check(tokens, length, max_windows=max_windows)
        # The last window needs one token more, the label of its last place.
        self._fitting = (len(tokens) - 1) // length
        super().__init__(tokens, length, min(max_windows or self._fitting, self._fitting))

    def _start(self, index: int) -> int:
        return index * self._fitting // self._count * self._length


def _check(tokens: npt.NDArray[Any], length: int, **counts: int | None) -> None:
    if tokens.ndim != 1 or not np.issubdtype(tokens.dtype, np.integer):
        raise ValueError(f"tokens must be integers of shape (num_tokens,), got {tokens.dtype} of shape {tokens.shape}")
    for name, count in {"length": length, **counts}.items():
        if count is not None and count < 1:
            raise ValueError(f"{name} must be at least 1, got {count}")
    if len(tokens) < length + 1:
        raise ValueError(
            f"tokens must hold at least one window of length {length} and the token after it "
            f"({length + 1} tokens), got a split of {len(tokens)} tokens"
        )


def _mix(value: int) -> int:
    """The finalizer of SplitMix64 (Steele, Lea and Flood 2014): a bijection of 64 bits that scatters neighbours."""
    value &= _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)
