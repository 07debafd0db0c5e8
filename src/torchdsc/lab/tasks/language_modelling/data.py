"""The corpus of a run, its tokens, and the tokenizer that they are of."""

import logging
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from torchdsc.lab.data.corpora import Corpus, load_corpus
from torchdsc.lab.data.tokenizers import load_tokenizer
from torchdsc.lab.data.tokens import FixedWindows, TokenSplits, tokenize_corpus

from .settings import Settings

__all__ = ["Data", "load_data"]

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Data:
    """A prepared corpus, its tokens, and the tokenizer that they are of."""

    corpus: Corpus
    tokens: TokenSplits
    tokenizer: PreTrainedTokenizerBase

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding: the tokens, rounded up to a multiple of 64."""
        return -(-self.tokens.vocab_size // 64) * 64

    @property
    def hashes(self) -> dict[str, str]:
        """Hash of the corpus, by its name."""
        return {self.corpus.name: self.corpus.sha256}

    @property
    def bytes_per_token(self) -> float:
        """Of the validation part."""
        return len(self.corpus.valid.encode()) / len(self.tokens.valid)

    def windows(self, split: str, length: int, most: int | None = None) -> FixedWindows:
        """Windows of a split, side by side."""
        return FixedWindows(getattr(self.tokens, split), length, most)


def load_data(settings: Settings) -> Data:
    """Load and tokenise the corpus.

    Args:
        settings: Of a run.

    Raises:
        ValueError: If a split is shorter than a window, or the corpus unusable.
        OSError: If the corpus or tokenizer cannot be read.
    """
    corpus = load_corpus(settings.corpus, preparation=settings.preparation, max_bytes=settings.max_bytes)
    tokenizer = load_tokenizer(settings.tokenizer, corpus, vocab_size=settings.vocab_size)
    if settings.tokenizer == "bpe" and len(tokenizer) < settings.vocab_size:
        asked, found = f"{settings.vocab_size:,}", f"{len(tokenizer):,}"
        _logger.warning("vocab_size = %s: the corpus gives a vocabulary of %s", asked, found)
    data = Data(corpus, tokenize_corpus(corpus, tokenizer), tokenizer)
    for split in ("train", "valid", "test"):
        try:
            data.windows(split, settings.window)
        except ValueError as error:
            raise ValueError(f"corpus {corpus.name!r} is too short in its {split} split: {error}") from error
    return data
