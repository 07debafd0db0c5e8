"""The four kinds of tokenizer, their round trips, the cache of trained ones, and every error."""

import json
import re
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from torchdsc.lab import tokenizers as lab_tokenizers
from torchdsc.lab.corpora import Corpus, load_corpus
from torchdsc.lab.tokenizers import (
    END_OF_TEXT,
    content_hash,
    default_cache_dir,
    load_tokenizer,
    plain_backend,
)

TRICKY = [
    "",
    " leading and trailing  ",
    "tabs\tand\n\n\nnewlines\r\n  indented\x0c",
    "don't , stop . now ?",
    "naïve 戦場のヴァルキュリア 🙂 \u200d \ufeff",
    "\x00\x01\x7f\x80ÿ­",
]


@pytest.fixture(scope="module")
def corpus():
    return load_corpus(max_bytes=150_000)


@pytest.fixture(scope="module")
def bpe(corpus, tmp_path_factory):
    return load_tokenizer("bpe", corpus, vocab_size=500, cache_dir=tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def byte_tokenizer(corpus):
    return load_tokenizer("bytes", corpus)


@pytest.fixture
def gpt2_files(bpe, tmp_path):
    """A folder with `vocab.json` and `merges.txt` alone, in GPT-2's own layout."""
    folder = tmp_path / "gpt2-files"
    folder.mkdir()
    model = json.loads(bpe.backend_tokenizer.to_str())["model"]
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")
    return folder


def round_trip(tokenizer, text):
    return tokenizer.decode(tokenizer.encode(text))


def check_end_of_text(tokenizer, token=END_OF_TEXT):
    assert tokenizer.eos_token == token
    assert tokenizer.encode(f"a{token}b")[1:-1] == [tokenizer.eos_token_id]


class TestBytes:
    def test_ids_are_byte_values(self, byte_tokenizer):
        assert isinstance(byte_tokenizer, PreTrainedTokenizerFast)
        assert len(byte_tokenizer) == 257
        text = "".join(map(chr, range(0x800)))
        assert byte_tokenizer.encode(text) == list(text.encode())

    def test_end_of_text(self, byte_tokenizer):
        assert byte_tokenizer.eos_token_id == 256
        check_end_of_text(byte_tokenizer)

    @pytest.mark.parametrize("text", TRICKY)
    def test_round_trip(self, byte_tokenizer, text):
        assert round_trip(byte_tokenizer, text) == text

    @settings(max_examples=200, deadline=None)
    @given(text=st.text())
    def test_round_trip_of_any_text(self, byte_tokenizer, text):
        assert round_trip(byte_tokenizer, text) == text


class TestBpe:
    def test_has_the_vocabulary_asked_for(self, bpe):
        assert isinstance(bpe, PreTrainedTokenizerFast)
        assert len(bpe) == 500
        check_end_of_text(bpe)

    def test_shortens_the_text_it_was_trained_on(self, bpe, corpus):
        assert len(bpe.encode(corpus.valid[:20_000])) < 0.6 * len(corpus.valid[:20_000].encode())

    @pytest.mark.parametrize("text", TRICKY)
    def test_round_trip(self, bpe, text):
        assert round_trip(bpe, text) == text

    @settings(max_examples=200, deadline=None)
    @given(text=st.text())
    def test_round_trip_of_any_text(self, bpe, text):
        assert round_trip(bpe, text) == text

    def test_smallest_vocabulary_is_the_bytes(self, corpus, tmp_path):
        tokenizer = load_tokenizer("bpe", corpus, vocab_size=257, cache_dir=tmp_path)
        assert len(tokenizer.encode("plain text")) == 10

    def test_small_corpus_gives_fewer_tokens(self, tmp_path):
        small = Corpus("small", "0" * 64, "aa bb\n", "v\n", "t\n")
        assert 257 < len(load_tokenizer("bpe", small, vocab_size=1000, cache_dir=tmp_path)) < 270

    def test_is_trained_on_the_training_part_only(self, tmp_path):
        held_out = "zyxwvut " * 200
        corpus = Corpus("c", "1" * 64, "abcdefg " * 200, held_out, held_out)
        tokenizer = load_tokenizer("bpe", corpus, vocab_size=280, cache_dir=tmp_path)
        assert len(tokenizer.encode("abcdefg")) <= 2
        assert len(tokenizer.encode("zyxwvut")) == 7

    def test_end_of_text_earns_no_merges(self, tmp_path):
        corpus = Corpus("c", "2" * 64, f"ab{END_OF_TEXT}" * 500, "v\n", "t\n")
        vocabulary = load_tokenizer("bpe", corpus, vocab_size=300, cache_dir=tmp_path).get_vocab()
        assert "ab" in vocabulary
        assert not [token for token in vocabulary if "en" in token and token != END_OF_TEXT]

    @pytest.mark.slow
    @pytest.mark.parametrize("unit", ["a", "ab" * 5000])
    def test_words_without_end(self, tmp_path, unit):
        """Three million bytes of one word, trained on and encoded; in a process of its own, as it once did not end."""
        script = """
import sys
from pathlib import Path
from torchdsc.lab.corpora import Corpus
from torchdsc.lab.tokenizers import load_tokenizer
from torchdsc.lab.tokens import tokenize_corpus

unit, folder = sys.argv[1], Path(sys.argv[2])
text = unit * (3_000_000 // len(unit))
corpus = Corpus("c", "3" * 64, text, text[:1000], text[:1000])
tokenizer = load_tokenizer("bpe", corpus, vocab_size=1000, cache_dir=folder)
tokens = tokenize_corpus(corpus, tokenizer, cache_dir=folder, progress=False)
assert tokenizer.decode(tokens.train.tolist()) == text
assert len(tokens.train) < len(text) / 500
"""
        done = subprocess.run(
            [sys.executable, "-c", script, unit, str(tmp_path)],
            timeout=120,
            check=False,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr

    def test_longest_word_changes_nothing_where_all_are_shorter(self, corpus, bpe, tmp_path, monkeypatch):
        monkeypatch.setattr(lab_tokenizers, "_LONGEST_WORD", 10**9)
        free = load_tokenizer("bpe", corpus, vocab_size=500, cache_dir=tmp_path)
        assert free.backend_tokenizer.to_str() == bpe.backend_tokenizer.to_str()
        words = free.backend_tokenizer.pre_tokenizer.pre_tokenize_str("a" * 5000)
        assert len(words) == 1

    def test_training_pieces_are_the_whole_text(self, corpus):
        pieces = list(lab_tokenizers._training_pieces(corpus.train))
        assert "".join(pieces) == corpus.train
        assert 1 < len(pieces) < 5
        assert all(piece.endswith("\n") for piece in pieces)


class TestBpeCache:
    def test_is_keyed_by_corpus_and_vocabulary(self, corpus, tmp_path, monkeypatch):
        trained = []
        train = lab_tokenizers._train_bpe
        monkeypatch.setattr(lab_tokenizers, "_train_bpe", lambda text, n: trained.append(n) or train(text, n))
        other = Corpus("other", "f" * 64, "text " * 50, "v\n", "t\n")
        first = load_tokenizer("bpe", corpus, vocab_size=300, cache_dir=tmp_path)
        second = load_tokenizer("bpe", corpus, vocab_size=300, cache_dir=tmp_path)
        assert content_hash(first) == content_hash(second)
        assert trained == [300]
        load_tokenizer("bpe", corpus, vocab_size=301, cache_dir=tmp_path)
        load_tokenizer("bpe", other, vocab_size=300, cache_dir=tmp_path)
        assert trained == [300, 301, 300]

    def test_training_is_deterministic(self, corpus, tmp_path):
        one, two = (load_tokenizer("bpe", corpus, vocab_size=400, cache_dir=tmp_path / name) for name in "ab")
        assert content_hash(one) == content_hash(two)

    def test_damaged_file_is_replaced(self, corpus, tmp_path):
        good = load_tokenizer("bpe", corpus, vocab_size=300, cache_dir=tmp_path)
        (file,) = (tmp_path / "tokenizers").iterdir()
        whole = file.read_bytes()
        file.write_bytes(whole[:1000])
        assert content_hash(load_tokenizer("bpe", corpus, vocab_size=300, cache_dir=tmp_path)) == content_hash(good)
        assert file.read_bytes() == whole

    def test_drafts_of_killed_runs_are_removed(self, corpus, tmp_path):
        load_tokenizer("bpe", corpus, vocab_size=300, cache_dir=tmp_path)
        (tmp_path / "tokenizers" / ".bpe-0-300.json.abcd_123.tmp").write_text("half")
        load_tokenizer("bpe", corpus, vocab_size=300, cache_dir=tmp_path)
        assert len(list((tmp_path / "tokenizers").iterdir())) == 1

    def test_default_place(self, corpus, tmp_path, monkeypatch):
        monkeypatch.setenv("HOME", str(tmp_path))
        monkeypatch.delenv("TORCHDSC_CACHE", raising=False)
        assert default_cache_dir() == tmp_path / ".cache" / "torchdsc"
        monkeypatch.setenv("TORCHDSC_CACHE", "~/chosen")
        assert default_cache_dir() == tmp_path / "chosen"
        load_tokenizer("bpe", corpus, vocab_size=300)
        assert len(list((tmp_path / "chosen" / "tokenizers").iterdir())) == 1


class TestFolders:
    def test_saved_tokenizer(self, bpe, corpus, tmp_path):
        bpe.save_pretrained(tmp_path)
        loaded = load_tokenizer(tmp_path, corpus)
        assert loaded.encode(corpus.valid[:5000]) == bpe.encode(corpus.valid[:5000])
        check_end_of_text(loaded)

    def test_vocabulary_and_merges_alone(self, gpt2_files, bpe, corpus):
        loaded = load_tokenizer(str(gpt2_files), corpus)
        assert isinstance(loaded, PreTrainedTokenizerFast)
        assert loaded.encode(corpus.valid[:5000]) == bpe.encode(corpus.valid[:5000])
        check_end_of_text(loaded)

    def test_end_of_text_of_its_own_is_kept(self, corpus, tmp_path):
        PreTrainedTokenizerFast(tokenizer_object=self.words("a", "b", "</s>"), eos_token="</s>").save_pretrained(
            tmp_path
        )
        loaded = load_tokenizer(tmp_path, corpus)
        check_end_of_text(loaded, "</s>")
        assert len(loaded) == 4

    def test_end_of_text_is_added_where_there_is_none(self, corpus, tmp_path):
        PreTrainedTokenizerFast(tokenizer_object=self.words("a", "b")).save_pretrained(tmp_path)
        loaded = load_tokenizer(tmp_path, corpus)
        check_end_of_text(loaded)
        assert loaded.eos_token_id == 3

    @staticmethod
    def words(*words):
        tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate([*words, "?"])}, unk_token="?"))
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        return tokenizer

    def test_shared_gpt2_tokenizer(self, shared_data, corpus):
        loaded = load_tokenizer(shared_data / "gpt2-bpe", corpus)
        assert len(loaded) == 50257
        assert loaded.eos_token_id == 50256
        assert loaded.encode("Hello world") == [15496, 995]
        check_end_of_text(loaded)


class TestHub:
    def test_asks_the_hub_by_name(self, corpus, bpe, monkeypatch):
        asked = []
        monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda name: asked.append(name) or bpe)
        assert load_tokenizer("gpt2", corpus) is bpe
        assert load_tokenizer("owner/name", corpus) is bpe
        assert asked == ["gpt2", "owner/name"]

    def test_failure_points_to_what_needs_no_hub(self, corpus, monkeypatch):
        def fail(name):
            raise RuntimeError("no route to host")

        monkeypatch.setattr(AutoTokenizer, "from_pretrained", fail)
        with pytest.raises(OSError, match=r"'gpt2' could not be loaded.*no route to host.*local folder"):
            load_tokenizer("gpt2", corpus)

    def test_slow_tokenizer(self, corpus, monkeypatch):
        monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda name: object())
        with pytest.raises(ValueError, match="tokenizer must be a fast one, got object from 'slow'"):
            load_tokenizer("slow", corpus)


class TestErrors:
    def test_blank(self, corpus):
        with pytest.raises(ValueError, match="tokenizer must be 'bytes', 'bpe'"):
            load_tokenizer("", corpus)

    @pytest.mark.parametrize("vocab_size", [256, 0, -1])
    def test_vocabulary_too_small(self, corpus, tmp_path, vocab_size):
        with pytest.raises(ValueError, match=f"vocab_size must be at least 257 .*got {vocab_size}"):
            load_tokenizer("bpe", corpus, vocab_size=vocab_size, cache_dir=tmp_path)

    @pytest.mark.parametrize("spec", ["./nothing", "~/nothing", "/no/such/folder", "a/b/c"])
    def test_missing_path(self, corpus, spec):
        with pytest.raises(FileNotFoundError, match=re.escape(spec)):
            load_tokenizer(spec, corpus)

    def test_file(self, corpus, tmp_path):
        (tmp_path / "tokenizer.json").write_text("{}")
        with pytest.raises(ValueError, match="got a file"):
            load_tokenizer(tmp_path / "tokenizer.json", corpus)

    @pytest.mark.parametrize(
        "files",
        [{}, {"vocab.json": "{}"}, {"vocab.json": "not json", "merges.txt": ""}, {"tokenizer.json": "{}"}],
    )
    def test_folder_without_a_tokenizer(self, corpus, tmp_path, files):
        for name, text in files.items():
            (tmp_path / name).write_text(text)
        with pytest.raises(ValueError, match="tokenizer must be a folder with a tokenizer"):
            load_tokenizer(tmp_path, corpus)


class TestBackend:
    def test_copies_without_truncation_and_padding(self, byte_tokenizer):
        limited = PreTrainedTokenizerFast(tokenizer_object=byte_tokenizer.backend_tokenizer, eos_token=END_OF_TEXT)
        limited.backend_tokenizer.enable_truncation(max_length=3)
        limited.backend_tokenizer.enable_padding(length=8)
        assert plain_backend(limited).encode("longer").ids == list(b"longer")
        assert limited.backend_tokenizer.truncation is not None, "the original is left as it is"
        assert content_hash(limited) == content_hash(byte_tokenizer)

    def test_hash_tells_tokenizers_apart(self, bpe, byte_tokenizer):
        assert re.fullmatch("[0-9a-f]{64}", content_hash(bpe))
        assert content_hash(bpe) != content_hash(byte_tokenizer)
