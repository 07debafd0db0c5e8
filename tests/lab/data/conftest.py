"""A corpus, and two tokenizers."""

import pytest
from transformers import PreTrainedTokenizerFast

from torchdsc.lab.data.corpora import Corpus, load_corpus
from torchdsc.lab.data.tokenizers import load_tokenizer


@pytest.fixture(scope="session")
def corpus() -> Corpus:
    """A beginning of the embedded corpus."""
    return load_corpus(max_bytes=200_000)


@pytest.fixture(scope="session")
def bpe(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerFast:
    """A BPE trained on it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHDSC_CACHE", str(tmp_path_factory.mktemp("cache")))
        return load_tokenizer("bpe", corpus, vocab_size=600)


@pytest.fixture(scope="session")
def byte_tokenizer(corpus: Corpus) -> PreTrainedTokenizerFast:
    """Tokens that are bytes."""
    return load_tokenizer("bytes", corpus)
