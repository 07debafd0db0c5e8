"""Token files and their cache, and the two datasets of windows."""

import dataclasses
import pickle
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers, processors
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerFast

from torchdsc.lab import tokens as lab_tokens
from torchdsc.lab.corpora import Corpus, load_corpus
from torchdsc.lab.tokenizers import END_OF_TEXT, load_tokenizer, plain_backend
from torchdsc.lab.tokens import FixedWindows, RandomWindows, TokenSplits, tokenize_corpus

SPLITS = ("train", "valid", "test")


@pytest.fixture(scope="module")
def corpus():
    return load_corpus(max_bytes=200_000)


@pytest.fixture(scope="module")
def bpe(corpus, tmp_path_factory):
    return load_tokenizer("bpe", corpus, vocab_size=600, cache_dir=tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def byte_tokenizer(corpus):
    return load_tokenizer("bytes", corpus)


@pytest.fixture
def small():
    return Corpus("small", "a" * 64, "training text\n" * 50, "validation text\n" * 50, "test text\n" * 50)


class TestTokenizeCorpus:
    def test_gives_the_tokens_of_each_split(self, corpus, bpe, tmp_path):
        splits = tokenize_corpus(corpus, bpe, cache_dir=tmp_path, progress=False)
        assert isinstance(splits, TokenSplits)
        assert splits.vocab_size == 600
        for split in SPLITS:
            tokens = getattr(splits, split)
            assert isinstance(tokens, np.memmap)
            assert tokens.dtype == np.uint16
            assert tokens.ndim == 1
            assert bpe.decode(tokens.tolist()) == getattr(corpus, split)
        with pytest.raises(ValueError, match="read-only"):
            splits.train[0] = 1
        with pytest.raises(dataclasses.FrozenInstanceError):
            splits.vocab_size = 1

    def test_tokens_are_those_of_the_whole_text(self, corpus, bpe, tmp_path):
        splits = tokenize_corpus(corpus, bpe, cache_dir=tmp_path, progress=False)
        assert len(list(lab_tokens._pieces(corpus.train))) > 5
        whole = plain_backend(bpe).encode(corpus.train, add_special_tokens=False).ids
        assert splits.train.tolist() == whole

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

    def test_lines_are_not_cut_where_no_space_is(self):
        pieces = list(lab_tokens._pieces("lines_of_text\n" * 5000))
        assert len(pieces) > 3
        assert all(piece.endswith("\n") for piece in pieces)

    def test_end_of_text_in_the_text_is_the_token(self, byte_tokenizer, tmp_path):
        corpus = Corpus("stories", "b" * 64, f"one{END_OF_TEXT}\ntwo", "v", "t")
        splits = tokenize_corpus(corpus, byte_tokenizer, cache_dir=tmp_path, progress=False)
        assert splits.train.tolist() == [*b"one", 256, *b"\ntwo"]

    def test_adds_no_special_tokens_and_truncates_nothing(self, small, byte_tokenizer, tmp_path):
        limited = PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer.from_str(byte_tokenizer.backend_tokenizer.to_str()), eos_token=END_OF_TEXT
        )
        limited.backend_tokenizer.enable_truncation(max_length=5)
        limited.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{END_OF_TEXT} $A", special_tokens=[(END_OF_TEXT, 256)]
        )
        assert limited.encode("a") == [256, *b"a"]
        splits = tokenize_corpus(small, limited, cache_dir=tmp_path, progress=False)
        assert splits.test.tolist() == list(small.test.encode())

    @pytest.mark.parametrize(("words", "dtype"), [(2**16 - 1, np.uint16), (2**16, np.uint16), (2**16 + 1, np.uint32)])
    def test_large_vocabularies_take_four_bytes(self, tmp_path, words, dtype):
        vocabulary = {f"w{i}": i for i in range(words - 1)} | {"?": words - 1}
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="?")))
        splits = tokenize_corpus(Corpus("c", "c" * 64, "?", "w1", "w2"), tokenizer, cache_dir=tmp_path, progress=False)
        assert (splits.vocab_size, splits.train.dtype, splits.train.tolist()) == (words, dtype, [words - 1])

    def test_progress_can_be_silenced(self, small, byte_tokenizer, tmp_path, capsys, monkeypatch):
        monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
        tokenize_corpus(small, byte_tokenizer, cache_dir=tmp_path / "a", progress=False)
        assert capsys.readouterr() == ("", "")
        tokenize_corpus(small, byte_tokenizer, cache_dir=tmp_path / "b")
        assert "tokenizing small: 100%" in capsys.readouterr().err
        tokenize_corpus(small, byte_tokenizer, cache_dir=tmp_path / "b")
        assert capsys.readouterr().err == "", "nothing is encoded, so nothing is shown"

    def test_split_without_tokens(self, small, tmp_path):
        backend = Tokenizer(models.WordLevel({"?": 0}, unk_token="?"))
        backend.normalizer = normalizers.Replace("validation text\n", "")
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
        for _ in range(2):
            with pytest.raises(
                ValueError, match="tokenizer must give tokens for every split, got none for valid of small"
            ):
                tokenize_corpus(small, tokenizer, cache_dir=tmp_path, progress=False)


class TestPublishedCut:
    def test_train_loses_its_end_and_valid_its_beginning(self, small, byte_tokenizer, tmp_path):
        published = dataclasses.replace(small, preparation="published")
        plain = tokenize_corpus(small, byte_tokenizer, cache_dir=tmp_path, progress=False)
        cut = tokenize_corpus(published, byte_tokenizer, cache_dir=tmp_path, progress=False)
        assert len(plain.train) == 700
        np.testing.assert_array_equal(cut.train, plain.train[:630])
        assert len(plain.valid) == 800
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

    def test_is_keyed_by_content(self, small, byte_tokenizer, bpe, encoded, tmp_path):
        first = tokenize_corpus(small, byte_tokenizer, cache_dir=tmp_path, progress=False)
        again = tokenize_corpus(
            dataclasses.replace(small, name="renamed"), byte_tokenizer, cache_dir=tmp_path, progress=False
        )
        assert len(encoded) == 3
        for split in SPLITS:
            np.testing.assert_array_equal(getattr(first, split), getattr(again, split))
        tokenize_corpus(small, bpe, cache_dir=tmp_path, progress=False)
        assert len(encoded) == 6
        tokenize_corpus(dataclasses.replace(small, sha256="d" * 64), bpe, cache_dir=tmp_path, progress=False)
        assert len(encoded) == 9

    def test_default_place(self, small, byte_tokenizer, tmp_path, monkeypatch):
        monkeypatch.setenv("TORCHDSC_CACHE", str(tmp_path / "chosen"))
        splits = tokenize_corpus(small, byte_tokenizer, progress=False)
        assert str(splits.train.filename).startswith(str(tmp_path / "chosen"))

    @pytest.mark.parametrize("split", SPLITS)
    def test_interruption_leaves_no_cache(self, split, small, byte_tokenizer, tmp_path, monkeypatch):
        encode = lab_tokens._encode

        def interrupted(text, backend, file, *rest):
            if text == getattr(small, split):
                file.write(b"half")
                file.flush()
                raise KeyboardInterrupt
            return encode(text, backend, file, *rest)

        with monkeypatch.context() as patch:
            patch.setattr(lab_tokens, "_encode", interrupted)
            with pytest.raises(KeyboardInterrupt):
                tokenize_corpus(small, byte_tokenizer, cache_dir=tmp_path, progress=False)
        assert not list(tmp_path.rglob(f"*{split}.bin*"))
        splits = tokenize_corpus(small, byte_tokenizer, cache_dir=tmp_path, progress=False)
        assert [bytes(getattr(splits, name).tolist()).decode() for name in SPLITS] == [
            small.train,
            small.valid,
            small.test,
        ]

    def test_drafts_of_killed_runs_are_removed(self, small, byte_tokenizer, bpe, tmp_path):
        """Also where the cache is whole, and in the folders of other corpora."""
        tokenize_corpus(small, byte_tokenizer, cache_dir=tmp_path, progress=False)
        (folder,) = (tmp_path / "tokens").iterdir()
        other = tmp_path / "tokens" / "other"
        other.mkdir()
        for draft in (folder / ".train.bin.abcd_123.tmp", other / ".valid.bin.abcd_123.tmp"):
            draft.write_text("half")
        tokenize_corpus(small, byte_tokenizer, cache_dir=tmp_path, progress=False)
        assert not list(tmp_path.rglob(".*"))

    @pytest.mark.parametrize(
        "damage", ["truncate", "same size", "remove", "counts", "no counts", "wrong type", "no checksums"]
    )
    def test_damage_is_repaired(self, damage, small, byte_tokenizer, encoded, tmp_path, caplog):
        tokenize_corpus(small, byte_tokenizer, cache_dir=tmp_path, progress=False)
        (folder,) = (tmp_path / "tokens").iterdir()
        file = folder / "valid.bin"
        whole = file.read_bytes()
        if damage == "truncate":
            file.write_bytes(whole[:-3])
        elif damage == "same size":
            file.write_bytes(whole[:-3] + bytes(3))
        elif damage == "remove":
            file.unlink()
        elif damage == "no counts":
            (folder / "counts.json").unlink()
        else:
            texts = {"counts": '{"train": 700', "wrong type": "[]"}
            texts["no checksums"] = '{"train": 700, "valid": 800, "test": 500}'
            (folder / "counts.json").write_text(texts[damage])
        splits = tokenize_corpus(small, byte_tokenizer, cache_dir=tmp_path, progress=False)
        assert len(encoded) == 6
        assert file.read_bytes() == whole
        assert splits.valid.tolist() == list(small.valid.encode())
        assert ("is damaged" in caplog.text) == (damage not in ("remove", "no counts"))
        assert sorted(path.name for path in folder.iterdir()) == ["counts.json", "test.bin", "train.bin", "valid.bin"]


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
        assert len(windows) == 50
        assert len(list(windows)) == 50
        for item in windows:
            check_item(item, 16)

    def test_items_share_no_memory(self):
        item = RandomWindows(TOKENS, 16, 1, seed=0)[0]
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

    def test_seeds_and_neighbours_are_unrelated(self):
        tokens = np.arange(2**16 - 1, dtype=np.uint16)
        table = np.array([self.starts(tokens, 16, 400, seed) for seed in range(20)], dtype=float)
        by_seed = np.corrcoef(table)[np.triu_indices(20, 1)]
        assert np.abs(by_seed).max() < 0.25
        in_sequence = [np.corrcoef(row[:-1], row[1:])[0, 1] for row in table]
        assert np.abs(in_sequence).max() < 0.2
        assert len({tuple(row) for row in table}) == 20
        # Two seeds must not walk through one sequence at different places.
        assert max(len(set(table[0]) & set(row)) for row in table[1:]) < 20

    def test_one_place(self):
        assert self.starts(TOKENS[:17], 16, 10) == [0] * 10

    def test_works_in_a_loader_with_workers(self):
        windows = RandomWindows(TOKENS, 16, 24, seed=0)
        one = [batch["input_ids"] for batch in DataLoader(windows, batch_size=8)]
        two = [batch["input_ids"] for batch in DataLoader(windows, batch_size=8, num_workers=2)]
        assert torch.equal(torch.cat(one), torch.cat(two))
        assert one[0].shape == (8, 16)

    def test_reads_token_files(self, small, byte_tokenizer, tmp_path):
        splits = tokenize_corpus(small, byte_tokenizer, cache_dir=tmp_path, progress=False)
        windows = RandomWindows(splits.train, 20, 5, seed=0)
        item = windows[3]
        assert byte_tokenizer.decode(item["input_ids"].tolist()) in small.train
        assert torch.equal(pickle.loads(pickle.dumps(windows))[3]["input_ids"], item["input_ids"])  # noqa: S301


class TestFixedWindows:
    def test_lie_side_by_side_from_the_start(self):
        windows = FixedWindows(TOKENS[:100], 10)
        # The tenth window has no token for its last label.
        assert len(windows) == 9
        for i, item in enumerate(windows):
            check_item(item, 10)
            assert int(item["input_ids"][0]) == 10 * i

    def test_last_token_as_label_is_enough(self):
        assert len(FixedWindows(TOKENS[:101], 10)) == 10
        assert len(FixedWindows(TOKENS[:11], 10)) == 1

    def test_fewer_windows_are_evenly_spaced(self):
        windows = FixedWindows(TOKENS, 10, max_windows=33)
        starts = [int(item["input_ids"][0]) for item in windows]
        assert len(starts) == 33
        assert starts == [10 * (i * 99 // 33) for i in range(33)] == list(range(0, 990, 30))
        starts = [int(item["input_ids"][0]) for item in FixedWindows(TOKENS, 10, max_windows=70)]
        assert len(set(starts)) == 70
        assert set(np.diff(starts)) == {10, 20}
        assert starts[-1] > 950

    def test_more_than_fit_gives_what_fits(self):
        assert len(FixedWindows(TOKENS, 10, max_windows=1000)) == 99
        assert len(FixedWindows(TOKENS, 10, max_windows=99)) == 99


class TestErrors:
    @pytest.mark.parametrize("make", [lambda t, n: RandomWindows(t, n, 4, 0), FixedWindows])
    def test_split_shorter_than_a_window(self, make):
        with pytest.raises(ValueError, match=r"length 16 .*\(17 tokens\), got a split of 16 tokens"):
            make(TOKENS[:16], 16)
        assert len(make(TOKENS[:17], 16)) >= 1

    @pytest.mark.parametrize("make", [lambda t, n: RandomWindows(t, n, 4, 0), FixedWindows])
    def test_arguments(self, make):
        with pytest.raises(TypeError, match="tokens must be a numpy array of integers, got list"):
            make([1, 2, 3], 1)
        with pytest.raises(TypeError, match="got float64"):
            make(np.zeros(9), 1)
        with pytest.raises(ValueError, match=r"tokens must have shape \(num_tokens,\), got \(3, 3\)"):
            make(np.zeros((3, 3), dtype=int), 1)
        with pytest.raises(ValueError, match="length must be at least 1, got 0"):
            make(TOKENS, 0)

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
    def test_wikitext_with_gpt2_tokens(self, shared_data, tmp_path):
        corpus = load_corpus(shared_data / "wikitext-2", max_bytes=300_000)
        tokenizer = load_tokenizer(shared_data / "gpt2-bpe", corpus)
        splits = tokenize_corpus(corpus, tokenizer, cache_dir=tmp_path, progress=False)
        assert splits.vocab_size == 50257
        assert splits.valid.tolist() == plain_backend(tokenizer).encode(corpus.valid).ids
        assert tokenizer.decode(splits.test.tolist()) == corpus.test
