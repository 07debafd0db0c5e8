"""Tokenizers of the lab: bytes, a BPE trained on the corpus, and pretrained ones from a folder or the hub."""

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, GPT2TokenizerFast, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from torchdsc.lab.files import cache_folder, expand, made_once, write_text

from .corpora import Corpus

__all__ = ["END_OF_TEXT", "content_hash", "load_tokenizer", "plain_backend"]

END_OF_TEXT = "<|endoftext|>"

_NUM_BYTES = 256
_TRAINING_PIECE = 2**16
# Bytes of a word that merges are learned from: training takes time with the square of a word's length. Words of
# languages and of source code are far shorter.
_LONGEST_WORD = 2**10


def load_tokenizer(spec: str | os.PathLike[str], corpus: Corpus, *, vocab_size: int = 4096) -> PreTrainedTokenizerFast:
    """Load a tokenizer, training it on the corpus where that is asked for.

    Args:
        spec: One of

            * "bytes": the token of a byte is its value, and 256 is the end of text.
            * "bpe": byte-level BPE trained on the corpus's training part, and cached by corpus and vocabulary size.
            * "gpt2" or any other name on the Hugging Face hub.
            * a local folder, as by ``save_pretrained``, or with GPT-2's ``vocab.json`` and ``merges.txt`` alone. Paths
              may hold variables of the environment.

            The first two decode what they encoded to the same text. They are byte-level, so they know every text.
        corpus: What "bpe" is trained on; the others do not read it.
        vocab_size: Of "bpe" only, with the end of text counted: at least 257. A corpus too small to give that many
            merges gives a smaller vocabulary; ``len(tokenizer)`` tells.

    Returns:
        The tokenizer. Its end of text is ``<|endoftext|>``, unless a pretrained tokenizer has another one of its own,
        which is kept because a pretrained model knows it.

    Raises:
        ValueError: If ``spec`` is not a folder with a fast tokenizer, or ``vocab_size`` is too small.
        OSError: If ``spec`` is a path that does not exist, or the hub has no such tokenizer or cannot be reached.
    """
    spec = expand(os.fspath(spec))
    if spec in ("bytes", "bpe"):
        backend = _byte_tokenizer() if spec == "bytes" else _trained_bpe(corpus, vocab_size)
        ends = {"bos_token": END_OF_TEXT, "eos_token": END_OF_TEXT}
        return PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False, **ends)
    path = Path(spec).expanduser()
    if path.exists():
        tokenizer = _from_folder(path)
    elif path.is_absolute() or spec.startswith((".", "~")) or spec.count("/") > 1:
        raise FileNotFoundError(f"tokenizer must be 'bytes', 'bpe', a folder or a name on the hub, got no path: {spec}")
    else:
        tokenizer = _from_hub(spec)
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise ValueError(f"tokenizer must be a fast one, got {type(tokenizer).__name__} from {spec!r}")
    if tokenizer.eos_token is None:
        tokenizer.add_special_tokens({"eos_token": END_OF_TEXT})
    return tokenizer


def _byte_tokenizer() -> Tokenizer:
    """A BPE without merges, whose ids are the byte values."""
    vocabulary = {character: byte for byte, character in bytes_to_unicode().items()}
    # Without merges the words do not matter, and not looking for them is over twice as fast.
    return _byte_level(models.BPE(vocab=vocabulary, merges=[]), use_regex=False)


def _byte_level(model: models.Model, *, use_regex: bool) -> Tokenizer:
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([END_OF_TEXT])
    return tokenizer


def _trained_bpe(corpus: Corpus, vocab_size: int) -> Tokenizer:
    if vocab_size <= _NUM_BYTES:
        raise ValueError(
            f"vocab_size must be at least {_NUM_BYTES + 1} for 'bpe' (bytes, end of text), got {vocab_size}"
        )
    path = cache_folder() / "tokenizers" / f"bpe-{corpus.sha256}-{vocab_size}.json"

    def read() -> Tokenizer:
        try:
            return Tokenizer.from_file(str(path))
        # The library raises plain Exception.
        except Exception as error:
            raise ValueError(str(error)) from error

    return made_once(path, read, lambda: write_text(path, _train_bpe(corpus.train, vocab_size).to_str()))


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


def _from_folder(folder: Path) -> PreTrainedTokenizerFast:
    files = sorted(path.name for path in folder.glob("*"))
    try:
        if {"vocab.json", "merges.txt"}.issubset(files) and not {"tokenizer.json", "tokenizer_config.json"} & {*files}:
            return GPT2TokenizerFast.from_pretrained(folder)
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    # Depending on what is missing or damaged, the libraries raise anything from KeyError to plain Exception.
    except Exception as error:
        raise ValueError(
            "tokenizer must be a folder with a tokenizer (tokenizer.json, or vocab.json and merges.txt), "
            f"got {folder} with {files} ({type(error).__name__}: {error})"
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


def content_hash(tokenizer: PreTrainedTokenizerFast) -> str:
    """What a fast tokenizer does to a text: the hex SHA-256 of its vocabulary, rules and added tokens."""
    return hashlib.sha256(plain_backend(tokenizer).to_str().encode()).hexdigest()


def plain_backend(tokenizer: PreTrainedTokenizerFast) -> Tokenizer:
    """A copy of the Rust tokenizer behind a fast one, without the truncation and padding that it may have set."""
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.no_truncation()
    backend.no_padding()
    return backend
