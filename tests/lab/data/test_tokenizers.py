"""The four kinds of tokenizer, their round trips, the cache of trained ones, and every error."""

import json
import re
import subprocess
import sys
from unittest.mock import ANY

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from torchdsc.lab.data import tokenizers as lab_tokenizers
from torchdsc.lab.data.corpora import Corpus
from torchdsc.lab.data.tokenizers import END_OF_TEXT, content_hash, load_tokenizer, plain_backend


@pytest.fixture(autouse=True)
def _own_cache(cache):
    """Each test has a cache of its own."""


def made_up(train, digit="0"):
    return Corpus("c", digit * 64, train, "v\n", "t\n")


def check_end_of_text(tokenizer, token=END_OF_TEXT):
    assert tokenizer.eos_token == token
    assert tokenizer.encode(f"a{token}b")[1:-1] == [tokenizer.eos_token_id]


@pytest.mark.parametrize("kind", ["bytes", "bpe"])
@settings(max_examples=100, deadline=None)
@example(text="")
@example(text=" leading and trailing  ")
@example(text="tabs\tand\n\n\nnewlines\r\n  indented\x0c, don't , stop . now ?")
@example(text="naïve 戦場のヴァルキュリア 🙂 \u200d \ufeff\x00\x01\x7f\x80ÿ­")
@given(text=st.text())
def test_round_trip_of_any_text(byte_tokenizer, bpe, kind, text):
    tokenizer = byte_tokenizer if kind == "bytes" else bpe
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_bytes(byte_tokenizer):
    assert isinstance(byte_tokenizer, PreTrainedTokenizerFast)
    assert (len(byte_tokenizer), byte_tokenizer.eos_token_id) == (257, 256)
    text = "".join(map(chr, range(0x800)))
    assert byte_tokenizer.encode(text) == list(text.encode())
    check_end_of_text(byte_tokenizer)


class TestBpe:
    def test_has_the_vocabulary_asked_for(self, bpe, corpus):
        assert isinstance(bpe, PreTrainedTokenizerFast)
        assert len(bpe) == 600
        check_end_of_text(bpe)
        assert len(bpe.encode(corpus.valid[:20_000])) < 0.6 * len(corpus.valid[:20_000].encode())
        assert len(load_tokenizer("bpe", corpus, vocab_size=257).encode("plain text")) == 10
        assert 257 < len(load_tokenizer("bpe", made_up("aa bb\n"), vocab_size=1000)) < 270

    def test_is_trained_on_the_training_part_only(self):
        held_out = "zyxwvut " * 200
        tokenizer = load_tokenizer("bpe", Corpus("c", "1" * 64, "abcdefg " * 200, held_out, held_out), vocab_size=280)
        assert len(tokenizer.encode("abcdefg")) <= 2
        assert len(tokenizer.encode("zyxwvut")) == 7

    def test_end_of_text_earns_no_merges(self):
        vocabulary = load_tokenizer("bpe", made_up(f"ab{END_OF_TEXT}" * 500), vocab_size=300).get_vocab()
        assert "ab" in vocabulary
        assert not [token for token in vocabulary if "en" in token and token != END_OF_TEXT]

    @pytest.mark.slow
    @pytest.mark.parametrize("unit", ["a", "ab" * 5000])
    def test_words_without_end(self, unit):
        """Three million bytes of one word, trained on and encoded; in a process of its own, as it once did not end."""
        script = """
import sys
from torchdsc.lab.data.corpora import Corpus
from torchdsc.lab.data.tokenizers import load_tokenizer
from torchdsc.lab.data.tokens import tokenize_corpus

unit = sys.argv[1]
text = unit * (3_000_000 // len(unit))
corpus = Corpus("c", "3" * 64, text, text[:1000], text[:1000])
tokenizer = load_tokenizer("bpe", corpus, vocab_size=1000)
tokens = tokenize_corpus(corpus, tokenizer, progress=False)
assert tokenizer.decode(tokens.train.tolist()) == text
assert len(tokens.train) < len(text) / 500
"""
        arguments = [sys.executable, "-c", script, unit]
        done = subprocess.run(arguments, timeout=120, check=False, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr

    def test_longest_word_changes_nothing_where_all_are_shorter(self, corpus, bpe, monkeypatch):
        monkeypatch.setattr(lab_tokenizers, "_LONGEST_WORD", 10**9)
        free = load_tokenizer("bpe", corpus, vocab_size=600)
        assert free.backend_tokenizer.to_str() == bpe.backend_tokenizer.to_str()
        assert len(free.backend_tokenizer.pre_tokenizer.pre_tokenize_str("a" * 5000)) == 1

    def test_training_pieces_are_the_whole_text(self, corpus):
        pieces = list(lab_tokenizers._training_pieces(corpus.train))
        assert "".join(pieces) == corpus.train
        assert 1 < len(pieces) < 5
        assert all(piece.endswith("\n") for piece in pieces)


class TestBpeCache:
    def test_is_keyed_by_corpus_and_vocabulary(self, monkeypatch):
        trained = []
        train = lab_tokenizers._train_bpe
        monkeypatch.setattr(lab_tokenizers, "_train_bpe", lambda text, n: trained.append((text, n)) or train(text, n))
        one, two = made_up("some text " * 50), made_up("other text " * 50, "f")
        for corpus, vocab_size in ((one, 260), (one, 260), (one, 261), (two, 260)):
            load_tokenizer("bpe", corpus, vocab_size=vocab_size)
        assert trained == [(one.train, 260), (one.train, 261), (two.train, 260)]

    def test_damaged_file_is_replaced(self, corpus, cache, caplog):
        good = load_tokenizer("bpe", corpus, vocab_size=300)
        (file,) = (cache / "tokenizers").glob("*.json")
        whole = file.read_bytes()
        file.write_bytes(whole[:1000])
        assert content_hash(load_tokenizer("bpe", corpus, vocab_size=300)) == content_hash(good)
        assert file.read_bytes() == whole
        assert re.findall("json is damaged and will be made anew: EOF while parsing", caplog.text) == [ANY]
        assert {path.name for path in file.parent.iterdir()} == {file.name, f".{file.name}.lock"}


class TestFolders:
    @pytest.mark.parametrize("layout", ["saved", "vocabulary and merges alone"])
    def test_tokenizer(self, bpe, corpus, tmp_path, layout):
        if layout == "saved":
            bpe.save_pretrained(tmp_path)
        else:
            model = json.loads(bpe.backend_tokenizer.to_str())["model"]
            merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
            (tmp_path / "vocab.json").write_text(json.dumps(model["vocab"]))
            (tmp_path / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")
        loaded = load_tokenizer(tmp_path, corpus)
        assert isinstance(loaded, PreTrainedTokenizerFast)
        assert loaded.encode(corpus.valid[:5000]) == bpe.encode(corpus.valid[:5000])
        check_end_of_text(loaded)

    @pytest.mark.parametrize("own", ["</s>", None])
    def test_end_of_text_of_its_own_is_kept(self, corpus, tmp_path, own):
        words = ["a", "b", "?", *([own] if own else [])]
        backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="?"))
        backend.pre_tokenizer = pre_tokenizers.Whitespace()
        PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=own).save_pretrained(tmp_path)
        loaded = load_tokenizer(tmp_path, corpus)
        check_end_of_text(loaded, own or END_OF_TEXT)
        assert (len(loaded), loaded.eos_token_id) == (4, 3)

    def test_shared_gpt2_tokenizer(self, shared_data, corpus):
        loaded = load_tokenizer(shared_data / "gpt2-bpe", corpus)
        assert (len(loaded), loaded.eos_token_id) == (50257, 50256)
        assert loaded.encode("Hello world") == [15496, 995]
        check_end_of_text(loaded)


class TestHub:
    def test_asks_the_hub_by_name(self, corpus, bpe, monkeypatch):
        asked = []
        monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda name: asked.append(name) or bpe)
        assert load_tokenizer("gpt2", corpus) is load_tokenizer("owner/name", corpus) is bpe
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
    @pytest.mark.parametrize("spec", ["./nothing", "~/nothing", "/no/such/folder", "a/b/c"])
    def test_missing_path(self, corpus, spec):
        with pytest.raises(FileNotFoundError, match=re.escape(spec)):
            load_tokenizer(spec, corpus)

    def test_small_vocabulary(self, corpus):
        with pytest.raises(ValueError, match=r"vocab_size must be at least 257 .*got 256"):
            load_tokenizer("bpe", corpus, vocab_size=256)

    @pytest.mark.parametrize(
        "files",
        [{}, {"vocab.json": "{}"}, {"vocab.json": "not json", "merges.txt": ""}, {"tokenizer.json": "{}"}],
    )
    def test_folder_without_a_tokenizer(self, corpus, tmp_path, files):
        for name, text in files.items():
            (tmp_path / name).write_text(text)
        for path in (tmp_path, *tmp_path.iterdir()):
            with pytest.raises(ValueError, match=f"tokenizer must be a folder with a tokenizer .*, got {path} with "):
                load_tokenizer(path, corpus)


def test_backend_and_hash_know_no_truncation_and_padding(byte_tokenizer, bpe):
    limited = PreTrainedTokenizerFast(tokenizer_object=byte_tokenizer.backend_tokenizer, eos_token=END_OF_TEXT)
    limited.backend_tokenizer.enable_truncation(max_length=3)
    limited.backend_tokenizer.enable_padding(length=8)
    assert plain_backend(limited).encode("longer").ids == list(b"longer")
    assert limited.backend_tokenizer.truncation is not None, "the original is left as it is"
    assert content_hash(limited) == content_hash(byte_tokenizer) != content_hash(bpe)
    assert re.fullmatch("[0-9a-f]{64}", content_hash(bpe))
