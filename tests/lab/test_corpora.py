"""Every source of a corpus, every preparation, and every error that a user can cause."""

import bz2
import dataclasses
import gzip
import hashlib
import lzma
import os
import re
import sys
import tracemalloc
import types

import pytest

from torchdsc.lab import corpora, corpus_sources, text_files
from torchdsc.lab.corpora import load_corpus

SENTENCES = [f"sentence number {i} of the fixture, long enough to be kept\n" for i in range(400)]
TEXT = "".join(SENTENCES)


PACK = {".xz": lzma.compress, ".gz": gzip.compress, ".bz2": bz2.compress}


def write_splits(folder, suffix=".txt", **splits):
    folder.mkdir(parents=True, exist_ok=True)
    for split, text in splits.items():
        (folder / f"{split}{suffix}").write_text(text, encoding="utf-8", newline="")
    return folder


class TestCorpus:
    def test_is_frozen_and_keeps_text_out_of_its_repr(self, tmp_path):
        corpus = load_corpus(str(write_splits(tmp_path / "c", train="alpha\n", valid="beta\n", test="gamma\n")))
        with pytest.raises(dataclasses.FrozenInstanceError):
            corpus.name = "other"
        assert "alpha" not in repr(corpus)
        assert "name='c'" in repr(corpus)

    def test_sha256_is_over_the_prepared_splits(self, tmp_path):
        folder = write_splits(tmp_path / "c", train=TEXT, valid=TEXT, test=TEXT)
        plain = load_corpus(folder)
        assert re.fullmatch("[0-9a-f]{64}", plain.sha256)
        assert load_corpus(folder).sha256 == plain.sha256
        assert load_corpus(folder, max_bytes=1000).sha256 != plain.sha256
        published = load_corpus(folder, preparation="published")
        assert published.sha256 != plain.sha256
        assert load_corpus(folder, preparation="published", seed=1).sha256 != published.sha256
        assert load_corpus(folder, seed=1).sha256 == plain.sha256

    def test_sha256_does_not_depend_on_the_place(self, tmp_path):
        parts = {"train": TEXT, "valid": "b\n", "test": "c\n"}
        assert (
            load_corpus(write_splits(tmp_path / "one", **parts)).sha256
            == load_corpus(write_splits(tmp_path / "two", **parts)).sha256
        )

    def test_sha256_sees_text_move_between_splits(self, tmp_path):
        one = load_corpus(write_splits(tmp_path / "one", train="a\nb\n", valid="c\n", test="d\n"))
        two = load_corpus(write_splits(tmp_path / "two", train="a\n", valid="b\nc\n", test="d\n"))
        assert one.train + one.valid + one.test == two.train + two.valid + two.test
        assert one.sha256 != two.sha256


@pytest.fixture(scope="module")
def embedded():
    return load_corpus(max_bytes=300_000)


class TestEmbedded:
    def test_is_python_source_in_three_disjoint_splits(self, embedded):
        assert embedded.name == "embedded"
        assert embedded.preparation == "plain"
        for text in (embedded.train, embedded.valid, embedded.test):
            assert 100_000 < len(text.encode()) <= 300_000
            assert "import " in text
        lines = [{line for line in text.split("\n") if len(line) > 60} for text in (embedded.train, embedded.valid)]
        assert len(lines[0] & lines[1]) < 0.05 * len(lines[1])

    def test_is_deterministic(self, embedded):
        assert load_corpus("embedded", max_bytes=300_000) == embedded

    def test_splits_by_file_and_leaves_out_what_is_not_the_library(self, tmp_path, monkeypatch):
        kept = {f"package{i}/module.py": f"value_{i} = {i}\n" for i in range(300)}
        left_out = {
            "site-packages/installed.py": "installed\n",
            "dist-packages/installed.py": "installed\n",
            "package1/__pycache__/module.py": "installed\n",
            "config-3.11-machine/config.py": "installed\n",
            "_sysconfigdata__machine.py": "installed\n",
            "package1/notes.txt": "installed\n",
        }
        for name, text in {**kept, **left_out}.items():
            file = tmp_path / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)
        (tmp_path / "latin.py").write_bytes("# caf\xe9\n".encode("latin-1"))
        monkeypatch.setattr(corpus_sources.sysconfig, "get_path", lambda name: str(tmp_path))
        corpus = load_corpus()
        splits = [text.splitlines() for text in (corpus.train, corpus.valid, corpus.test)]
        assert sorted([line for split in splits for line in split]) == sorted(x.strip() for x in kept.values())
        assert len(splits[0]) == pytest.approx(270, abs=20)
        assert min(len(splits[1]), len(splits[2])) >= 5

        # A file stays in its split whatever comes or goes beside it.
        (tmp_path / "package0/module.py").unlink()
        for name in ("added.py", "package7/added.py"):
            (tmp_path / name).write_text("added\n")
        again = load_corpus()
        for before, after in zip(splits, (again.train, again.valid, again.test), strict=True):
            assert [line for line in after.splitlines() if line != "added"] == [x for x in before if x != "value_0 = 0"]

    def test_order_does_not_come_from_the_disk(self, tmp_path, monkeypatch):
        for i in range(100):
            (tmp_path / f"module{i}.py").write_text(f"value_{i}\n")
        monkeypatch.setattr(corpus_sources.sysconfig, "get_path", lambda name: str(tmp_path))
        before = load_corpus()
        walk = os.walk
        monkeypatch.setattr(corpus_sources.os, "walk", lambda root: [(a, b, names[::-1]) for a, b, names in walk(root)])
        assert load_corpus() == before

    def test_without_a_library_on_disk(self, tmp_path, monkeypatch):
        monkeypatch.setattr(corpus_sources.sysconfig, "get_path", lambda name: str(tmp_path))
        with pytest.raises(ValueError, match="standard library's source files"):
            load_corpus()


class TestHub:
    @staticmethod
    def fake_datasets(load_dataset):
        module = types.ModuleType("datasets")
        module.load_dataset = load_dataset
        return module

    @pytest.mark.parametrize("name", ["wikitext-2", "wikitext-103"])
    def test_reads_the_raw_form_line_by_line(self, name, monkeypatch):
        asked = []

        def load_dataset(repository, configuration):
            asked.append((repository, configuration))
            rows = ["", " = Title = \n", "", " A line . \n"]
            return {"train": {"text": rows}, "validation": {"text": rows[1:]}, "test": {"text": rows[:2]}}

        monkeypatch.setitem(sys.modules, "datasets", self.fake_datasets(load_dataset))
        corpus = load_corpus(name)
        assert asked == [("Salesforce/wikitext", f"{name}-raw-v1")]
        assert corpus.name == name
        assert corpus.train == "\n = Title = \n\n A line . \n"
        assert corpus.valid == " = Title = \n\n A line . \n"
        assert corpus.test == "\n = Title = \n"

    def test_missing_package_names_the_extra(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "datasets", None)
        with pytest.raises(ImportError, match=re.escape("pip install 'torchdsc[corpora]'")):
            load_corpus("wikitext-2")

    def test_failing_download_points_to_a_folder(self, monkeypatch):
        def load_dataset(repository, configuration):
            raise RuntimeError("no route to host")

        monkeypatch.setitem(sys.modules, "datasets", self.fake_datasets(load_dataset))
        with pytest.raises(OSError, match=r"wikitext-103.*no route to host.*folder"):
            load_corpus("wikitext-103")


class TestFolderWithSplits:
    @pytest.mark.parametrize(
        ("train", "valid", "test"),
        [
            ("train.txt", "valid.txt", "test.txt"),
            ("wiki.train.tokens", "wiki.valid.tokens", "wiki.test.tokens"),
            ("wiki.train.raw", "wiki.validation.raw", "wiki.test.raw"),
            ("TRAIN.md", "Dev.md", "Test.md"),
            ("training-00000", "val-00000", "test-00000"),
            ("train/a.txt", "valid/a.txt", "test/a.txt"),
            ("train/sub/a.py", "dev/test_b.py", "test/c.py"),
            ("train.tsv", "dev/data.tsv", "test.tsv"),
        ],
    )
    def test_recognises_names(self, tmp_path, train, valid, test):
        for name, text in {train: "in train\n", valid: "in valid\n", test: "in test\n", "LICENSE": "not it\n"}.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(text)
        corpus = load_corpus(str(tmp_path))
        assert (corpus.train, corpus.valid, corpus.test) == ("in train\n", "in valid\n", "in test\n")

    @pytest.mark.parametrize(("suffix", "module"), [(".xz", lzma), (".gz", gzip), (".bz2", bz2)])
    def test_decompresses(self, tmp_path, suffix, module):
        for split in ("train", "valid", "test"):
            (tmp_path / f"{split}.txt{suffix}").write_bytes(module.compress(f"héllo {split}\n".encode()))
        assert load_corpus(tmp_path).valid == "héllo valid\n"

    def test_plain_file_wins_over_its_compressed_twin(self, tmp_path):
        write_splits(tmp_path, train="plain\n", valid="v\n", test="t\n")
        (tmp_path / "train.txt.xz").write_bytes(lzma.compress(b"packed\n"))
        assert load_corpus(tmp_path).train == "plain\n"

    def test_joins_the_files_of_a_split_in_order(self, tmp_path):
        write_splits(tmp_path, **{"train-2": "two\n", "train-1": "one", "valid": "v\n", "test": "t\n"})
        assert load_corpus(tmp_path).train == "one\ntwo\n"

    def test_valid_is_halved_when_there_is_no_test(self, tmp_path):
        corpus = load_corpus(write_splits(tmp_path, train="a\n", valid=TEXT))
        assert corpus.train == "a\n"
        assert corpus.valid + corpus.test == TEXT
        assert corpus.valid.endswith("\n")
        assert len(corpus.valid) == pytest.approx(len(TEXT) / 2, abs=len(SENTENCES[-1]))

    def test_valid_is_cut_from_train_when_there_is_only_test(self, tmp_path):
        corpus = load_corpus(write_splits(tmp_path, train=TEXT, test="t\n"))
        assert corpus.test == "t\n"
        assert corpus.train + corpus.valid == TEXT
        assert len(corpus.valid) == pytest.approx(0.05 * len(TEXT), abs=len(SENTENCES[-1]))

    def test_train_alone_is_cut_in_three(self, tmp_path):
        corpus = load_corpus(write_splits(tmp_path, train=TEXT))
        assert corpus.train + corpus.valid + corpus.test == TEXT
        assert len(corpus.train) == pytest.approx(0.9 * len(TEXT), abs=len(SENTENCES[-1]))

    def test_held_out_parts_without_train(self, tmp_path):
        write_splits(tmp_path, valid="v\n", test="t\n")
        with pytest.raises(ValueError, match=r"with a train part.*valid\.txt"):
            load_corpus(tmp_path)

    def test_wiki_extractor_lines_are_taken_out(self, tmp_path):
        extracted = '<doc id="12" url="http://x?curid=12" title="A > B">\nTitle\n\nText </doc> here.\n</doc>\n'
        write_splits(tmp_path, train=extracted * 2, valid="</doc>\n", test="t\n")
        corpus = load_corpus(tmp_path)
        assert corpus.train == "Title\n\nText </doc> here.\n" * 2
        assert corpus.valid == "</doc>\n", "lines of a file that is not WikiExtractor's are text"

    def test_line_ends_and_byte_order_mark(self, tmp_path):
        write_splits(tmp_path, train="\ufeffone\r\ntwo\r\n", valid="v\n", test="t\n")
        assert load_corpus(tmp_path).train == "one\ntwo\n"


class TestContiguous:
    def check(self, corpus, text):
        assert corpus.train + corpus.valid + corpus.test == text
        for part, fraction in ((corpus.train, 0.9), (corpus.valid, 0.05), (corpus.test, 0.05)):
            assert part.endswith("\n")
            assert len(part) == pytest.approx(fraction * len(text), abs=2 * len(SENTENCES[-1]))

    def test_single_file(self, tmp_path):
        file = tmp_path / "train.txt"
        file.write_text(TEXT)
        corpus = load_corpus(str(file))
        assert corpus.name == "train.txt"
        self.check(corpus, TEXT)

    def test_compressed_file(self, tmp_path):
        file = tmp_path / "book.xz"
        file.write_bytes(lzma.compress(TEXT.encode()))
        self.check(load_corpus(file), TEXT)

    def test_folder_is_joined_in_sorted_order(self, tmp_path):
        for i, name in enumerate(["a.txt", "b/a.rst", "b/wiki_00", "c.md"]):
            file = tmp_path / name
            file.parent.mkdir(exist_ok=True)
            file.write_text("".join(SENTENCES[100 * i : 100 * (i + 1)]))
        (tmp_path / ".hidden").write_text("hidden\n")
        (tmp_path / "picture.png").write_bytes(b"\x89PNG\0")
        (tmp_path / "b" / "loop").symlink_to(tmp_path, target_is_directory=True)
        self.check(load_corpus(tmp_path), TEXT)

    def test_source_code_tells_no_splits(self, tmp_path):
        third = len(SENTENCES) // 4
        for i, name in enumerate(["test/case.py", "test_a.py", "train.py", "valid.py"]):
            file = tmp_path / name
            file.parent.mkdir(exist_ok=True)
            file.write_text("".join(SENTENCES[third * i : third * (i + 1)]))
        self.check(load_corpus(tmp_path), TEXT)

    def test_text_without_lines_is_cut_between_words(self, tmp_path):
        text = "word " * 997
        (tmp_path / "one_line").write_text(text)
        corpus = load_corpus(tmp_path / "one_line")
        assert corpus.train + corpus.valid + corpus.test == text
        assert corpus.train.endswith("word ")
        assert corpus.valid.endswith("word ")
        assert len(corpus.train) == pytest.approx(0.9 * len(text), abs=5)

    def test_home_and_relative_paths(self, tmp_path, monkeypatch):
        write_splits(tmp_path / "wikitext-2", train="a\n", valid="b\n", test="c\n")
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("HOME", str(tmp_path))
        assert load_corpus("./wikitext-2") == load_corpus("~/wikitext-2")
        assert load_corpus("./wikitext-2").name == "wikitext-2"


class TestPublished:
    @pytest.fixture
    def folder(self, tmp_path):
        long = "".join(f"line {i} is longer than ten\n" for i in range(4000))
        return write_splits(tmp_path / "c", train=long + "exactly10!\nexactly11!!\n\n", valid=long, test=long)

    def test_keeps_long_lines_and_adds_sums(self, folder):
        corpus = load_corpus(folder, preparation="published")
        assert corpus.preparation == "published"
        lines = corpus.train.split("\n")
        added = [i for i, line in enumerate(lines) if line.startswith("Calc")]
        assert [line for line in lines if not line.startswith("Calc")] == [
            *(f"line {i} is longer than ten" for i in range(4000)),
            "exactly11!!",
            "",
        ]
        assert len(added) / 4001 == pytest.approx(0.15, abs=0.03)
        numbers = []
        for i in added:
            match = re.fullmatch(r"Calc: (\d+) \+ (\d+) \+ (\d+) = (\d+)", lines[i])
            *terms, total = map(int, match.groups())
            assert sum(terms) == total
            assert not lines[i - 1].startswith("Calc")
            numbers += terms
        assert (min(numbers), max(numbers)) == (0, 99)

    def test_adds_different_sums_to_each_split(self, folder):
        corpus = load_corpus(folder, preparation="published")
        sums = [re.findall("Calc.*", text) for text in (corpus.train, corpus.valid, corpus.test)]
        assert sums[0][:20] != sums[1][:20] != sums[2][:20]

    def test_the_seed_decides(self, folder):
        first = load_corpus(folder, preparation="published", seed=3)
        assert load_corpus(folder, preparation="published", seed=3) == first
        assert load_corpus(folder, preparation="published", seed=4).train != first.train

    def test_takes_the_first_bytes_of_each_split(self, tmp_path, monkeypatch):
        monkeypatch.setattr(corpora, "_PUBLISHED_CALC_PROBABILITY", 0.0)
        monkeypatch.setattr(corpora, "_PUBLISHED_BYTES", 32)
        folder = write_splits(tmp_path, **dict.fromkeys(("train", "valid", "test"), "ü" * 12 + "\n" + "é" * 30 + "\n"))
        # 24 bytes and a newline leave 7 bytes, which are three letters: a line too short to stay.
        assert load_corpus(folder, preparation="published").train == "ü" * 12 + "\n"
        monkeypatch.setattr(corpora, "_PUBLISHED_BYTES", 50)
        assert load_corpus(folder, preparation="published").test == "ü" * 12 + "\n" + "é" * 12 + "\n"

    def test_limit_is_that_of_the_publication(self):
        assert corpora._PUBLISHED_BYTES == 20_000_000


class TestMaxBytes:
    def test_cuts_at_line_boundaries(self, tmp_path):
        line = "äöü line\n"  # 12 bytes
        folder = write_splits(tmp_path, train=line * 10, valid=line * 3, test=line * 2)
        corpus = load_corpus(folder, max_bytes=35)
        assert (corpus.train, corpus.valid, corpus.test) == (line * 2, line * 2, line * 2)
        assert load_corpus(folder, max_bytes=36).train == line * 3
        assert load_corpus(folder, max_bytes=10**6).train == line * 10

    def test_cuts_inside_a_first_line_that_is_too_long(self, tmp_path):
        folder = write_splits(tmp_path, train="x" * 90 + "\nsecond\n", valid="v\n", test="t\n")
        assert load_corpus(folder, max_bytes=50).train == "x" * 50


class TestMaxBytesOfCompressedFiles:
    """The same text as of plain files, without unpacking what is not asked for."""

    def pack(self, folder, suffix, **texts):
        folder.mkdir(exist_ok=True)
        for split, text in texts.items():
            (folder / f"{split}.txt{suffix}").write_bytes(PACK[suffix](text.encode()))
        return folder

    @pytest.mark.parametrize("suffix", PACK)
    @pytest.mark.parametrize("splits", [("train", "valid", "test"), ("train", "valid"), ("train", "test"), ("train",)])
    def test_as_plain_files(self, tmp_path, suffix, splits):
        doc = "\r\n".join(["<doc id=7 url=x>", "Title, größer", "é" * 40, "</doc>"]) + "\r\n"
        texts = {split: "\ufeff" + split + "\r\n" + doc * 9 for split in splits}
        plain = tmp_path / "plain"
        plain.mkdir()
        for split, text in texts.items():
            (plain / f"{split}.txt").write_bytes(text.encode())
        packed = self.pack(tmp_path / "packed", suffix, **texts)
        for max_bytes in (*range(20, 420), 10**6):
            expected, found = (load_corpus(folder, max_bytes=max_bytes) for folder in (plain, packed))
            assert found.sha256 == expected.sha256, max_bytes

    @pytest.mark.parametrize("suffix", PACK)
    def test_no_more_is_unpacked_than_asked_for(self, tmp_path, suffix):
        folder = self.pack(tmp_path, suffix, train="a line of text\n" * 1_000_000, valid="v\n" * 99, test="t\n" * 99)
        tracemalloc.start()
        try:
            corpus = load_corpus(folder, max_bytes=1000)
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert corpus.train == "a line of text\n" * 66
        # LZMA's own window is 8 MB.
        assert peak < 12_000_000

    def test_published_preparation_sees_its_own_bytes(self, tmp_path, monkeypatch):
        monkeypatch.setattr(corpora, "_PUBLISHED_BYTES", 200)
        text = "short\n" * 20 + "longer than ten\n" * 20
        folder = self.pack(tmp_path, ".xz", train=text, valid=text, test=text)
        corpus = load_corpus(folder, preparation="published", max_bytes=40)
        assert "longer than ten\n" in corpus.train

    @pytest.mark.parametrize("layout", ["file", "folder", "train alone"])
    def test_one_that_is_cut_in_proportion_has_a_most(self, tmp_path, monkeypatch, layout):
        monkeypatch.setattr(text_files, "_MOST_UNPACKED", 5000)
        name = "train" if layout == "train alone" else "text"
        folder = self.pack(tmp_path, ".xz", **{name: TEXT})
        path = folder / f"{name}.txt.xz" if layout == "file" else folder
        for max_bytes in (None, len(TEXT) // 99):
            assert load_corpus(path, max_bytes=max_bytes).train
        with pytest.raises(
            ValueError, match=r"unpack to at most 5,000 bytes where max_bytes is given, got more from .*xz"
        ):
            load_corpus(path, max_bytes=10)


class TestErrors:
    @pytest.mark.parametrize("name", ["pipe", "train.txt", "train.txt.xz"])
    def test_pipe(self, tmp_path, name):
        os.mkfifo(tmp_path / name)
        (tmp_path / "folder").mkdir()
        (tmp_path / "folder" / "train.txt").symlink_to(tmp_path / name)
        for spec in (tmp_path / name, tmp_path / "folder"):
            with pytest.raises(ValueError, match="corpus must be regular files, got a pipe or a device: "):
                load_corpus(spec)

    def test_device(self):
        with pytest.raises(ValueError, match="got a pipe or a device: /dev/zero"):
            load_corpus("/dev/zero")

    def test_unknown_name(self):
        with pytest.raises(
            ValueError, match=r"corpus must be one of \['embedded', 'wikitext-2', 'wikitext-103'\].*'wiki'"
        ):
            load_corpus("wiki")

    @pytest.mark.parametrize("spec", ["no/such/folder", "./nothing", "missing.txt"])
    def test_missing_path(self, spec, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        with pytest.raises(FileNotFoundError, match=re.escape(spec)):
            load_corpus(spec)

    def test_variable_that_is_not_set(self, monkeypatch):
        monkeypatch.delenv("NOWHERE", raising=False)
        with pytest.raises(ValueError, match="the environment variable NOWHERE is not set"):
            load_corpus("${NOWHERE}/wikitext-2")

    def test_blank_name(self):
        with pytest.raises(ValueError, match="corpus must be a name"):
            load_corpus(" ")

    def test_unknown_preparation(self):
        with pytest.raises(ValueError, match=r"preparation must be one of \['plain', 'published'\], got 'raw'"):
            load_corpus(preparation="raw")

    @pytest.mark.parametrize("max_bytes", [0, -5])
    def test_bad_limit(self, max_bytes):
        with pytest.raises(ValueError, match=f"max_bytes must be None or at least 1, got {max_bytes}"):
            load_corpus(max_bytes=max_bytes)

    def test_empty_folder(self, tmp_path):
        with pytest.raises(ValueError, match="folder with text files, got none"):
            load_corpus(tmp_path)

    @pytest.mark.parametrize("text", ["", "\n", "x"])
    def test_empty_or_tiny_file(self, tmp_path, text):
        (tmp_path / "f.txt").write_text(text)
        with pytest.raises(ValueError, match="empty train split"):
            load_corpus(tmp_path / "f.txt")

    @pytest.mark.parametrize("split", ["train", "valid", "test"])
    def test_empty_split(self, tmp_path, split):
        write_splits(tmp_path, **{"train": "a\n", "valid": "b\n", "test": "c\n", split: " \n"})
        with pytest.raises(ValueError, match=f"got an empty {split} split"):
            load_corpus(tmp_path)

    def test_published_preparation_that_leaves_nothing(self, tmp_path):
        write_splits(tmp_path, train=TEXT, valid="short\n", test=TEXT)
        with pytest.raises(ValueError, match="empty valid split"):
            load_corpus(tmp_path, preparation="published")

    @pytest.mark.parametrize("data", [b"text\0text\n", "caf\xe9\n".encode("latin-1")])
    @pytest.mark.parametrize("name", ["train.bin", "notes.txt"])
    def test_binary(self, tmp_path, data, name):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ValueError, match=rf"binary file.*{name}"):
            load_corpus(tmp_path)
        with pytest.raises(ValueError, match=rf"binary file.*{name}"):
            load_corpus(tmp_path / name)

    def test_folder_without_any_text(self, tmp_path):
        (tmp_path / "image.png").write_bytes(b"\x89PNG\0")
        with pytest.raises(ValueError, match="folder with text files, got none"):
            load_corpus(tmp_path)

    @pytest.mark.parametrize(
        ("suffix", "data"),
        [
            (".xz", b"not xz"),
            (".gz", b"not gz"),
            (".bz2", b"not bz2"),
            (".gz", gzip.compress(TEXT.encode())[:-20]),
            (".xz", lzma.compress(TEXT.encode())[:-20]),
        ],
    )
    def test_damaged_compression(self, tmp_path, suffix, data):
        (tmp_path / f"train.txt{suffix}").write_bytes(data)
        with pytest.raises(ValueError, match=r"corpus must be readable files, got .*train\.txt"):
            load_corpus(tmp_path)

    def test_dangling_link(self, tmp_path):
        (tmp_path / "train.txt").symlink_to(tmp_path / "gone.txt")
        with pytest.raises(ValueError, match=r"corpus must be readable files, got .*train\.txt"):
            load_corpus(tmp_path)


class TestSharedData:
    def test_wikitext_2_is_byte_exact(self, shared_data):
        corpus = load_corpus(shared_data / "wikitext-2")
        sums = [hashlib.sha256(text.encode()).hexdigest()[:8] for text in (corpus.train, corpus.valid, corpus.test)]
        assert sums == ["9e9fa1ad", "f0737ed3", "d790b833"]

    def test_enwiki_validation_part(self, shared_data):
        corpus = load_corpus(shared_data / "enwiki-2015" / "enwiki.valid.txt", preparation="published")
        assert "<doc " not in corpus.train
        assert corpus.train.startswith("George, Margrave of Brandenburg-Ansbach\n")
        assert "\n\n" not in corpus.train

    def test_raw_held_out_files_are_not_trained_on(self, shared_data):
        with pytest.raises(ValueError, match="with a train part"):
            load_corpus(shared_data / "wikitext-raw")
