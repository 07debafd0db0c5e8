"""Tokenizers of the lab: bytes, a BPE trained on the corpus, and pretrained ones from a folder or the hub."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, GPT2TokenizerFast, PreTrainedTokenizerFast

from torchdsc.lab.corpora import Corpus
from torchdsc.lab.files import remove_drafts, write_text

END_OF_TEXT = "<|endoftext|>"

_NUM_BYTES = 256
_TRAINING_PIECE = 2**16
# Bytes of a word that merges are learned from: training takes time with the square of a word's length. Words of
# languages and of source code are far shorter.
_LONGEST_WORD = 2**10

_logger = logging.getLogger(__name__)


def load_tokenizer(
    spec: str | os.PathLike[str],
    corpus: Corpus,
    *,
    vocab_size: int = 4096,
    cache_dir: Path | None = None,
) -> PreTrainedTokenizerFast:
    """Loads a tokenizer, training it on the corpus where that is asked for.

    What `spec` may be:

    * `"bytes"`: the token of a byte is its value, and 256 is the end of text.
    * `"bpe"`: byte-level BPE trained on the corpus's training part, and cached by corpus and vocabulary size.
    * `"gpt2"` or any other name on the Hugging Face hub.
    * a local folder, as written by `save_pretrained`, or with GPT-2's `vocab.json` and `merges.txt` alone.

    The first two decode what they encoded to the same text. They are byte-level, so they know every text.

    Args:
        spec: the tokenizer, as above.
        corpus: what "bpe" is trained on; the others do not read it.
        vocab_size: of "bpe" only, with the end of text counted: at least 257. A corpus too small to give that
            many merges gives a smaller vocabulary; `len(tokenizer)` tells.
        cache_dir: where trained tokenizers are kept; None is `default_cache_dir()`.

    Returns:
        The tokenizer. Its end of text is `<|endoftext|>`, unless a pretrained tokenizer has another one of its own,
        which is kept because a pretrained model knows it.

    Raises:
        ValueError: `spec` is empty or not a folder with a fast tokenizer, or `vocab_size` is too small.
        FileNotFoundError: `spec` is a path that does not exist.
        OSError: the hub has no such tokenizer, or cannot be reached.
    """
    spec = os.fspath(spec)
    if not spec.strip():
        raise ValueError(f"tokenizer must be 'bytes', 'bpe', a folder or a name on the hub, got {spec!r}")
    if spec == "bytes":
        return _wrap(_byte_tokenizer())
    if spec == "bpe":
        return _wrap(_trained_bpe(corpus, vocab_size, cache_dir or default_cache_dir()))
    path = Path(spec).expanduser()
    if path.is_dir():
        tokenizer = _from_folder(path)
    elif path.exists():
        raise ValueError(f"tokenizer must be a folder with a tokenizer's files, got a file: {path}")
    elif path.is_absolute() or spec.startswith((".", "~")) or spec.count("/") > 1:
        raise FileNotFoundError(
            f"tokenizer must be 'bytes', 'bpe', a folder or a name on the hub, got a missing path: {spec}"
        )
    else:
        tokenizer = _from_hub(spec)
    return _with_end_of_text(tokenizer, spec)


def default_cache_dir() -> Path:
    """Tells where trained tokenizers and token files are kept: `$TORCHDSC_CACHE`, or `~/.cache/torchdsc`.

    Returns:
        The folder, which need not exist yet.
    """
    chosen = os.environ.get("TORCHDSC_CACHE")
    return Path(chosen).expanduser() if chosen else Path.home() / ".cache" / "torchdsc"


def _byte_tokenizer() -> Tokenizer:
    """A BPE without merges, whose ids are the byte values."""
    # ByteLevel writes a printable byte as itself, and gives the others the characters from 256 on, in order.
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(_NUM_BYTES) if byte not in printable]
    vocabulary = {chr(byte): byte for byte in printable}
    vocabulary.update({chr(_NUM_BYTES + i): byte for i, byte in enumerate(others)})
    # Without merges the words do not matter, and not looking for them is over twice as fast.
    return _byte_level(models.BPE(vocab=vocabulary, merges=[]), use_regex=False)


def _byte_level(model: models.Model, *, use_regex: bool) -> Tokenizer:
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([END_OF_TEXT])
    return tokenizer


def _trained_bpe(corpus: Corpus, vocab_size: int, cache_dir: Path) -> Tokenizer:
    if vocab_size <= _NUM_BYTES:
        raise ValueError(
            f"vocab_size must be at least {_NUM_BYTES + 1} for 'bpe' (bytes, end of text), got {vocab_size}"
        )
    path = cache_dir / "tokenizers" / f"bpe-{corpus.sha256}-{vocab_size}.json"
    remove_drafts(path.parent)
    if path.is_file():
        try:
            return Tokenizer.from_file(str(path))
        # The library raises plain Exception for a file that it cannot parse.
        except Exception as error:
            _logger.warning("%s is damaged (%s): training the tokenizer again", path, error)
    tokenizer = _train_bpe(corpus.train, vocab_size)
    write_text(path, tokenizer.to_str())
    return tokenizer


def _train_bpe(text: str, vocab_size: int) -> Tokenizer:
    tokenizer = _byte_level(models.BPE(), use_regex=True)
    whole_words = tokenizer.pre_tokenizer
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([whole_words, pre_tokenizers.FixedLength(_LONGEST_WORD)])
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[END_OF_TEXT],
        show_progress=False,
    )
    tokenizer.train_from_iterator(_training_pieces(text), trainer)
    # Encoding has no need of it.
    tokenizer.pre_tokenizer = whole_words
    return tokenizer


def _training_pieces(text: str) -> Iterator[str]:
    # An end of text in the corpus is a token already: its letters must not earn merges.
    for document in text.split(END_OF_TEXT):
        start = 0
        while start < len(document):
            newline = document.find("\n", start + _TRAINING_PIECE)
            end = len(document) if newline < 0 else newline + 1
            yield document[start:end]
            start = end


def _wrap(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        clean_up_tokenization_spaces=False,
    )


def _from_folder(folder: Path) -> PreTrainedTokenizerFast:
    files = {path.name for path in folder.iterdir()}
    try:
        if {"vocab.json", "merges.txt"} <= files and not files & {"tokenizer.json", "tokenizer_config.json"}:
            return GPT2TokenizerFast.from_pretrained(folder)
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    # Depending on what is missing or damaged, the libraries raise anything from KeyError to plain Exception.
    except Exception as error:
        raise ValueError(
            "tokenizer must be a folder with a tokenizer (tokenizer.json, or vocab.json and merges.txt), "
            f"got {folder} with {sorted(files)} ({type(error).__name__}: {error})"
        ) from error


def _from_hub(name: str) -> PreTrainedTokenizerFast:
    try:
        return AutoTokenizer.from_pretrained(name)
    # The hub's clients raise errors of several unrelated families; all mean that the tokenizer is not to be had.
    except Exception as error:
        raise OSError(
            f"tokenizer {name!r} could not be loaded from the hub ({type(error).__name__}: {error}); "
            "it may be 'bytes', 'bpe' or a local folder instead"
        ) from error


def _with_end_of_text(tokenizer: PreTrainedTokenizerFast, spec: str) -> PreTrainedTokenizerFast:
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise ValueError(f"tokenizer must be a fast one, got {type(tokenizer).__name__} from {spec!r}")
    if tokenizer.eos_token is None:
        tokenizer.add_special_tokens({"eos_token": END_OF_TEXT})
    return tokenizer


def content_hash(tokenizer: PreTrainedTokenizerFast) -> str:
    """Identifies what a tokenizer does to a text: SHA-256 of its vocabulary, rules and added tokens.

    Args:
        tokenizer: any fast tokenizer.

    Returns:
        The hex digest; truncation and padding do not enter it.
    """
    return hashlib.sha256(plain_backend(tokenizer).to_str().encode()).hexdigest()


def plain_backend(tokenizer: PreTrainedTokenizerFast) -> Tokenizer:
    """Copies the Rust tokenizer behind a fast one, without the truncation and padding that it may have set.

    Args:
        tokenizer: any fast tokenizer.

    Returns:
        The copy; the original is left as it is.
    """
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.no_truncation()
    backend.no_padding()
    return backend
