"""Token files and their cache, and the two datasets of windows."""

import dataclasses
import pickle
import re
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers, processors
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerFast

from torchdsc.lab.data import tokens as lab_tokens
from torchdsc.lab.data.corpora import Corpus, load_corpus
from torchdsc.lab.data.tokenizers import END_OF_TEXT, load_tokenizer, plain_backend
from torchdsc.lab.data.tokens import FixedWindows, RandomWindows, ShuffledWindows, tokenize_corpus

SPLITS = ("train", "valid", "test")


@pytest.fixture
def small():
    return Corpus("small", "a" * 64, "training text\n" * 50, "validation text\n" * 50, "test text\n" * 50)


@pytest.fixture
def tokenize(cache):
    """Tokenises into a cache of the test's own, without a bar."""
    return lambda corpus, tokenizer: tokenize_corpus(corpus, tokenizer, progress=False)


class TestTokenizeCorpus:
    def test_gives_the_tokens_of_each_split(self, corpus, bpe, tokenize):
        splits = tokenize(corpus, bpe)
        assert splits.vocab_size == 600
        assert len(list(lab_tokens._pieces(corpus.train))) > 5
        for split in SPLITS:
            tokens = getattr(splits, split)
            assert isinstance(tokens, np.memmap)
            assert (tokens.dtype, tokens.ndim) == (np.uint16, 1)
            assert tokens.tolist() == plain_backend(bpe).encode(getattr(corpus, split), add_special_tokens=False).ids
        with pytest.raises(ValueError, match="read-only"):
            splits.train[0] = 1

    @settings(max_examples=150, deadline=None)
    @given(text=st.text(alphabet="ab1'. \n\té", min_size=20, max_size=200))
    def test_cuts_change_no_token(self, bpe, text):
        backend = plain_backend(bpe)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(lab_tokens, "_CHUNK", 5)
            patch.setattr(lab_tokens, "_LINE_CUT", lab_tokens._SAFE_CUT)
            patch.setattr(lab_tokens, "_SEARCH", 300)
            # A long enough search never has to cut elsewhere, and the text's end needs none.
            pieces = list(lab_tokens._pieces(text + " a" * 400))
        assert len(pieces) > 1
        assert [i for piece in pieces for i in backend.encode(piece).ids] == backend.encode("".join(pieces)).ids

    @pytest.mark.parametrize("text", ["", "short", "x" * 10**5, "一" * 10**5, "line\n" * 10**5, " \n" * 10**5])
    def test_pieces_are_the_whole_text(self, text):
        pieces = list(lab_tokens._pieces(text))
        assert "".join(pieces) == text
        assert max(map(len, pieces), default=0) <= lab_tokens._CHUNK + lab_tokens._SEARCH
        # Lines are not cut where no space is.
        assert "\n" not in text or all(piece.endswith("\n") for piece in pieces)

    def test_end_of_text_in_the_text_is_the_token(self, byte_tokenizer, tokenize):
        splits = tokenize(Corpus("stories", "b" * 64, f"one{END_OF_TEXT}\ntwo", "v", "t"), byte_tokenizer)
        assert splits.train.tolist() == [*b"one", 256, *b"\ntwo"]

    def test_adds_no_special_tokens_and_truncates_nothing(self, small, byte_tokenizer, tokenize):
        limited = PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer.from_str(byte_tokenizer.backend_tokenizer.to_str()), eos_token=END_OF_TEXT
        )
        limited.backend_tokenizer.enable_truncation(max_length=5)
        limited.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{END_OF_TEXT} $A", special_tokens=[(END_OF_TEXT, 256)]
        )
        assert limited.encode("a") == [256, *b"a"]
        assert tokenize(small, limited).test.tolist() == list(small.test.encode())

    @pytest.mark.parametrize(("words", "dtype"), [(2**16 - 1, np.uint16), (2**16, np.uint16), (2**16 + 1, np.uint32)])
    def test_large_vocabularies_take_four_bytes(self, tokenize, words, dtype):
        vocabulary = {f"w{i}": i for i in range(words - 1)} | {"?": words - 1}
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="?")))
        splits = tokenize(Corpus("c", "c" * 64, "?", "w1", "w2"), tokenizer)
        assert (splits.vocab_size, splits.train.dtype, splits.train.tolist()) == (words, dtype, [words - 1])

    def test_progress_can_be_silenced(self, small, byte_tokenizer, tokenize, bpe, capsys, monkeypatch):
        monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
        tokenize(small, byte_tokenizer)
        assert capsys.readouterr() == ("", "")
        tokenize_corpus(small, bpe)
        assert "tokenizing small: 100%" in capsys.readouterr().err
        tokenize_corpus(small, bpe)
        assert capsys.readouterr().err == "", "nothing is encoded, so nothing is shown"

    def test_split_without_tokens(self, small, tokenize, cache):
        backend = Tokenizer(models.WordLevel({"?": 0}, unk_token="?"))
        backend.normalizer = normalizers.Replace("validation text\n", "")
        with pytest.raises(ValueError, match="tokenizer must give tokens for every split, got none for valid of small"):
            tokenize(small, PreTrainedTokenizerFast(tokenizer_object=backend))
        assert [path.suffix for path in (cache / "tokens").iterdir()] == [".lock"]

    def test_published_train_loses_its_end_and_valid_its_beginning(self, small, byte_tokenizer, tokenize):
        plain = tokenize(small, byte_tokenizer)
        cut = tokenize(dataclasses.replace(small, preparation="published"), byte_tokenizer)
        assert (len(plain.train), len(plain.valid)) == (700, 800)
        np.testing.assert_array_equal(cut.train, plain.train[:630])
        np.testing.assert_array_equal(cut.valid, plain.valid[720:])
        np.testing.assert_array_equal(cut.test, plain.test)
        assert isinstance(cut.train, np.memmap)


class TestTokenCache:
    @pytest.fixture
    def encoded(self, monkeypatch):
        """The texts that were really encoded."""
        texts = []
        encode = lab_tokens._encode
        monkeypatch.setattr(lab_tokens, "_encode", lambda text, *rest: texts.append(text) or encode(text, *rest))
        return texts

    def test_is_keyed_by_content(self, small, byte_tokenizer, bpe, encoded, tokenize):
        first = tokenize(small, byte_tokenizer)
        again = tokenize(dataclasses.replace(small, name="renamed"), byte_tokenizer)
        assert len(encoded) == 3
        for split in SPLITS:
            np.testing.assert_array_equal(getattr(first, split), getattr(again, split))
        tokenize(small, bpe)
        assert len(encoded) == 6
        tokenize(dataclasses.replace(small, sha256="d" * 64), bpe)
        assert len(encoded) == 9

    def test_one_of_two_encodes(self, small, byte_tokenizer, tokenize, encoded, monkeypatch):
        encode = lab_tokens._encode
        monkeypatch.setattr(lab_tokens, "_encode", lambda *given: time.sleep(0.1) or encode(*given))
        with ThreadPoolExecutor(2) as pool:
            one, two = pool.map(tokenize, [small] * 2, [byte_tokenizer] * 2)
        assert len(encoded) == 3
        assert one.train.tolist() == two.train.tolist() == list(small.train.encode())

    @pytest.mark.parametrize(
        ("file", "content", "reason"),
        [
            ("valid.bin", b"too short", "a file of tokens is not what was written"),
            ("valid.bin", bytes(1600), "a file of tokens is not what was written"),
            ("valid.bin", None, "No such file or directory: '.*/valid.bin'"),
            ("sha256.json", None, "No such file or directory: '.*/sha256.json'"),
            ("sha256.json", b'{"train": 700', "sha256.json is damaged: Expecting"),
            ("sha256.json", b"{}", "a file of tokens is not what was written"),
        ],
    )
    def test_damage_is_repaired(self, file, content, reason, small, byte_tokenizer, encoded, cache, tokenize, caplog):
        tokenize(small, byte_tokenizer)
        (folder,) = (cache / "tokens").glob("[!.]*")
        before = {path.name: path.read_bytes() for path in folder.iterdir()}
        (folder / file).unlink() if content is None else (folder / file).write_bytes(content)
        assert tokenize(small, byte_tokenizer).valid.tolist() == list(small.valid.encode())
        assert len(encoded) == 6
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
        (message,) = caplog.messages
        assert re.search(f"{folder.name} is damaged and will be made anew: .*{reason}", message)


TOKENS = np.arange(1000, dtype=np.uint16)


def check_item(item, length):
    assert set(item) == {"input_ids", "labels", "shift_labels"}
    for tensor in item.values():
        assert tensor.dtype == torch.int64
        assert tensor.shape == (length,)
    assert torch.equal(item["labels"], item["input_ids"])
    # TOKENS counts up, so the next token is one more.
    assert torch.equal(item["shift_labels"], item["input_ids"] + 1)
    assert torch.equal(item["input_ids"], item["input_ids"][0] + torch.arange(length))


class TestRandomWindows:
    def test_items(self):
        windows = RandomWindows(TOKENS, 16, 50, seed=0)
        assert len(windows) == len(list(windows)) == 50
        for item in windows:
            check_item(item, 16)

    @pytest.mark.parametrize("windows", [RandomWindows(TOKENS, 16, 1, seed=0), FixedWindows(TOKENS, 16)])
    def test_items_share_no_memory(self, windows):
        item = windows[0]
        item["input_ids"].zero_()
        assert item["labels"].sum() > 0
        assert torch.equal(item["shift_labels"], item["labels"] + 1)

    @staticmethod
    def starts(tokens=TOKENS, length=16, count=200, seed=0):
        windows = RandomWindows(tokens, length, count, seed)
        return [int(windows[i]["input_ids"][0]) for i in range(count)]

    def test_depends_on_seed_and_index_alone(self):
        starts = self.starts(seed=5)
        windows = RandomWindows(TOKENS, 16, 10**9, seed=5)
        assert [int(windows[i]["input_ids"][0]) for i in reversed(range(200))] == starts[::-1]
        assert self.starts(seed=6) != starts
        assert self.starts(seed=-1) != self.starts(seed=1)

    def test_places_are_fixed_for_good(self):
        # Known values: a change of the generator would silently change what a resumed training sees.
        assert self.starts(seed=0, count=5) == [277, 642, 689, 380, 645]
        assert self.starts(seed=42, count=5) == [615, 329, 822, 911, 609]

    def test_the_generator_is_splitmix64(self):
        golden = lab_tokens._GOLDEN
        # The first two outputs for the state 1234567, as its reference implementation gives them.
        assert [lab_tokens._mix(1234567 + i * golden) for i in (1, 2)] == [6457827717110365317, 3203168211198807973]

    def test_every_place_is_reached_equally_often(self):
        starts = self.starts(TOKENS[:20], 4, count=16_000)
        counts = np.bincount(starts, minlength=16)
        assert len(counts) == 16, "the last window ends with the last token as label"
        # Chi-square with 15 degrees of freedom: 0.1 % above 37.7.
        assert ((counts - 1000) ** 2 / 1000).sum() < 37.7

    def test_works_in_a_loader_with_workers(self):
        windows = RandomWindows(TOKENS, 16, 24, seed=0)
        one = [batch["input_ids"] for batch in DataLoader(windows, batch_size=8)]
        two = [batch["input_ids"] for batch in DataLoader(windows, batch_size=8, num_workers=2)]
        assert torch.equal(torch.cat(one), torch.cat(two))
        assert one[0].shape == (8, 16)

    def test_can_be_sent_to_a_process(self):
        windows = RandomWindows(TOKENS, 20, 5, seed=0)
        copy = pickle.loads(pickle.dumps(windows))  # noqa: S301
        assert torch.equal(copy[3]["input_ids"], windows[3]["input_ids"])


class TestShuffledWindows:
    def test_no_token_is_predicted_twice(self):
        starts = [int(item["input_ids"][0]) for item in ShuffledWindows(TOKENS, 16, 62, seed=3)]
        assert sorted(starts) == list(range(0, 62 * 16, 16))
        assert starts != sorted(starts)

    def test_depends_on_the_seed(self):
        order = {seed: [int(item["input_ids"][0]) for item in ShuffledWindows(TOKENS, 16, 9, seed)] for seed in (0, 1)}
        assert order[0] != order[1]
        # A longer training begins with the same windows.
        assert [int(item["input_ids"][0]) for item in ShuffledWindows(TOKENS, 16, 12, 0)][:9] == order[0]

    def test_too_few(self):
        with pytest.raises(ValueError, match=r"must hold 63 windows of length 16 .* of 1,000 tokens, which holds 62"):
            ShuffledWindows(TOKENS, 16, 63, seed=0)


class TestFixedWindows:
    def test_lie_side_by_side_from_the_start(self):
        for i, item in enumerate(FixedWindows(TOKENS[:100], 10)):
            check_item(item, 10)
            assert int(item["input_ids"][0]) == 10 * i

    @pytest.mark.parametrize(
        ("tokens", "most", "expected"),
        # The tenth window of 100 has no token for its last label.
        [(100, None, 9), (101, None, 10), (11, None, 1), (1000, 1000, 99), (1000, 33, 33)],
    )
    def test_how_many_fit(self, tokens, most, expected):
        assert len(FixedWindows(TOKENS[:tokens], 10, most)) == expected

    def test_fewer_windows_are_evenly_spaced(self):
        windows = FixedWindows(TOKENS, 10, max_windows=33)
        starts = [int(item["input_ids"][0]) for item in windows]
        assert starts == list(range(0, 990, 30))
        starts = [int(item["input_ids"][0]) for item in FixedWindows(TOKENS, 10, max_windows=70)]
        assert len(set(starts)) == 70
        assert set(np.diff(starts)) == {10, 20}
        assert starts[-1] > 950


class TestErrors:
    @pytest.mark.parametrize("make", [lambda t, n: RandomWindows(t, n, 4, 0), FixedWindows])
    @pytest.mark.parametrize(
        ("tokens", "length", "message"),
        [
            (TOKENS[:16], 16, r"length 16 .*\(17 tokens\), got a split of 16 tokens"),
            (np.zeros(9), 1, r"tokens must be integers of shape \(num_tokens,\), got float64 of shape \(9,\)"),
            (np.zeros((3, 3), dtype=int), 1, r"tokens must be integers .*, got int64 of shape \(3, 3\)"),
            (TOKENS, 0, "length must be at least 1, got 0"),
        ],
    )
    def test_arguments(self, make, tokens, length, message):
        with pytest.raises(ValueError, match=message):
            make(tokens, length)

    def test_counts(self):
        with pytest.raises(ValueError, match="num_samples must be at least 1, got 0"):
            RandomWindows(TOKENS, 4, 0, 0)
        with pytest.raises(ValueError, match="max_windows must be at least 1, got 0"):
            FixedWindows(TOKENS, 4, 0)

    @pytest.mark.parametrize("windows", [RandomWindows(TOKENS, 10, 99, 0), FixedWindows(TOKENS, 10)])
    def test_index(self, windows):
        assert torch.equal(windows[-1]["input_ids"], windows[98]["input_ids"])
        assert torch.equal(windows[np.int64(3)]["input_ids"], windows[3]["input_ids"])
        for index in (99, -100):
            with pytest.raises(IndexError, match=f"got {index}"):
                windows[index]


class TestSharedData:
    def test_wikitext_with_gpt2_tokens(self, shared_data, tokenize):
        corpus = load_corpus(shared_data / "wikitext-2", max_bytes=300_000)
        tokenizer = load_tokenizer(shared_data / "gpt2-bpe", corpus)
        splits = tokenize(corpus, tokenizer)
        assert splits.vocab_size == 50257
        assert splits.valid.tolist() == plain_backend(tokenizer).encode(corpus.valid).ids
        assert tokenizer.decode(splits.test.tolist()) == corpus.test
