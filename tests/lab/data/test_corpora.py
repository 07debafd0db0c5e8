"""Every source of a corpus, every preparation, and every error that a user can cause."""

import bz2
import gzip
import hashlib
import lzma
import os
import re
import tracemalloc

import pytest

from torchdsc.lab.data import corpora, sources, text_files
from torchdsc.lab.data.corpora import load_corpus

SENTENCES = [f"sentence number {i} of the fixture, long enough to be kept\n" for i in range(400)]
TEXT = "".join(SENTENCES)
PACK = {".xz": lzma.compress, ".gz": gzip.compress, ".bz2": bz2.compress}


def write(folder, files):
    """Writes texts or bytes to files by name, packed as the name says: returns the folder."""
    for name, content in files.items():
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        data = content.encode() if isinstance(content, str) else content
        file.write_bytes(PACK.get(file.suffix, bytes)(data))
    return folder


def write_splits(folder, suffix=".txt", **splits):
    return write(folder, {f"{split}{suffix}": text for split, text in splits.items()})


def texts(corpus):
    return corpus.train, corpus.valid, corpus.test


def test_sha256_is_over_the_prepared_splits(tmp_path):
    folder = write_splits(tmp_path / "c", train=TEXT, valid=TEXT, test=TEXT)
    whole, *others = (load_corpus(folder, **some) for some in ({}, {"max_bytes": 1000}, {"preparation": "published"}))
    assert re.fullmatch("[0-9a-f]{64}", whole.sha256)
    assert load_corpus(write_splits(tmp_path / "d", train=TEXT, valid=TEXT, test=TEXT)).sha256 == whole.sha256
    one = load_corpus(write_splits(tmp_path / "one", train="a\nb\n", valid="c\n", test="d\n"))
    two = load_corpus(write_splits(tmp_path / "two", train="a\n", valid="b\nc\n", test="d\n"))
    assert len({corpus.sha256 for corpus in (whole, *others, one, two)}) == 5
    assert repr(one) == f"Corpus(name='one', sha256='{one.sha256}', preparation='plain')"


class TestEmbedded:
    def test_is_python_source_in_three_disjoint_splits(self):
        corpus = load_corpus(max_bytes=300_000)
        assert load_corpus("embedded", max_bytes=300_000) == corpus
        assert (corpus.name, corpus.preparation) == ("embedded", "plain")
        for text in texts(corpus):
            assert 100_000 < len(text.encode()) <= 300_000
            assert "import " in text
        lines = [{line for line in text.split("\n") if len(line) > 60} for text in (corpus.train, corpus.valid)]
        assert len(lines[0] & lines[1]) < 0.05 * len(lines[1])

    def test_splits_by_file_and_leaves_out_what_is_not_the_library(self, tmp_path, monkeypatch):
        kept = {f"package{i}/module.py": f"value_{i} = {i}\n" for i in range(300)}
        places = ["site-packages", "dist-packages", "package1/__pycache__", "config-3.11-machine"]
        left_out = [*(f"{place}/installed.py" for place in places), "_sysconfigdata__machine.py", "package1/notes.txt"]
        write(tmp_path, kept | dict.fromkeys(left_out, "installed\n") | {"latin.py": "# caf\xe9\n".encode("latin-1")})
        monkeypatch.setattr(sources.sysconfig, "get_path", lambda name: str(tmp_path))
        corpus = load_corpus()
        splits = [text.splitlines() for text in texts(corpus)]
        assert sorted(line for split in splits for line in split) == sorted(text.strip() for text in kept.values())
        assert len(splits[0]) == pytest.approx(270, abs=20)
        assert min(len(splits[1]), len(splits[2])) >= 5

        # Their order does not come from the disk.
        walk = os.walk

        def backwards(root):
            for folder, subfolders, names in walk(root):
                subfolders.reverse()
                yield folder, subfolders, names[::-1]

        with monkeypatch.context() as patch:
            patch.setattr(sources.os, "walk", backwards)
            assert load_corpus() == corpus

        # A file stays in its split whatever comes or goes beside it.
        (tmp_path / "package0/module.py").unlink()
        write(tmp_path, dict.fromkeys(("added.py", "package7/added.py"), "added\n"))
        for before, after in zip(splits, texts(load_corpus()), strict=True):
            assert [line for line in after.splitlines() if line != "added"] == [x for x in before if x != "value_0 = 0"]

    def test_without_a_library_on_disk(self, tmp_path, monkeypatch):
        monkeypatch.setattr(sources.sysconfig, "get_path", lambda name: str(tmp_path))
        with pytest.raises(ValueError, match="standard library's source files"):
            load_corpus()


@pytest.mark.parametrize("name", ["wikitext-2", "wikitext-103"])
def test_hub_gives_the_raw_form_line_by_line(name, monkeypatch):
    rows = ["", " = Title = \n", "", " A line . \n"]
    parts = {"train": rows, "validation": rows[1:], "test": rows[:2]}

    def load_dataset(repository, configuration, split):
        assert (repository, configuration) == ("Salesforce/wikitext", f"{name}-raw-v1")
        return {"text": parts[split]}

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    corpus = load_corpus(name)
    assert corpus.name == name
    title, line = " = Title = \n", "\n A line . \n"
    assert texts(corpus) == (f"\n{title}{line}", f"{title}{line}", f"\n{title}")


class TestFolderWithSplits:
    @pytest.mark.parametrize(
        "names",
        [
            ("train.txt", "valid.txt", "test.txt"),
            ("wiki.train.raw", "wiki.validation.raw", "wiki.test.raw"),
            ("TRAIN.md", "Dev.md", "Test.md"),
            ("training-00000", "val-00000", "test-00000"),
            ("train/sub/a.py", "dev/test_b.py", "test/c.py"),
            ("train.tsv", "dev/data.tsv", "test.tsv.gz"),
            ("train.txt.xz", "valid.txt.gz", "test.txt.bz2"),
        ],
    )
    def test_recognises_names(self, tmp_path, names):
        write(tmp_path, {**dict(zip(names, ("in train\n", "in välid\n", "in test\n"), strict=True)), "LICENSE": "no\n"})
        assert texts(load_corpus(str(tmp_path))) == ("in train\n", "in välid\n", "in test\n")

    @pytest.mark.parametrize("twins", [("train.txt", "train.txt.xz"), ("train.txt.bz2", "train.txt.gz")])
    @pytest.mark.parametrize("folder", ["", "train/"])
    def test_first_of_twins_alone(self, tmp_path, twins, folder):
        write_splits(tmp_path, valid="v\n", test="t\n")
        write(tmp_path, {f"{folder}{name}": f"{name}\n" for name in twins})
        assert load_corpus(tmp_path).train == f"{twins[0]}\n"

    def test_joins_the_files_of_a_split_in_order(self, tmp_path):
        write_splits(tmp_path, **{"train-2": "two\n", "train-1": "one", "valid": "v\n", "test": "t\n"})
        write(tmp_path, {"train/a": "three\n"})
        assert load_corpus(tmp_path).train == "one\ntwo\nthree\n"

    @pytest.mark.parametrize(
        ("given", "shares"),
        [
            ({"train": "a\n", "valid": TEXT}, {"valid": 0.5, "test": 0.5}),
            ({"train": TEXT, "test": "t\n"}, {"train": 0.95, "valid": 0.05}),
            ({"train": TEXT}, {"train": 0.9, "valid": 0.05, "test": 0.05}),
        ],
    )
    def test_missing_parts_are_cut_out_of_others(self, tmp_path, given, shares):
        corpus = load_corpus(write_splits(tmp_path, **given))
        assert "".join(getattr(corpus, split) for split in shares) == TEXT
        for split, share in shares.items():
            assert getattr(corpus, split).endswith("\n")
            assert len(getattr(corpus, split)) == pytest.approx(share * len(TEXT), abs=2 * len(SENTENCES[-1]))
        assert all(getattr(corpus, split) == text for split, text in given.items() if split not in shares)

    def test_held_out_parts_without_train(self, tmp_path):
        write_splits(tmp_path, valid="v\n", test="t\n")
        with pytest.raises(ValueError, match=r"with a train part.*valid\.txt"):
            load_corpus(tmp_path)

    def test_lines_that_are_no_text(self, tmp_path):
        """Those of WikiExtractor, in its files alone; ends of lines, and the mark of the order of bytes."""
        extracted = '<doc id="12" url="http://x?curid=12" title="A > B">\nTitle\n\nText </doc> here.\n</doc>\n'
        write_splits(tmp_path, train=extracted * 2, valid="</doc>\n", test="\ufeffone\r\ntwo\r\n")
        assert texts(load_corpus(tmp_path)) == ("Title\n\nText </doc> here.\n" * 2, "</doc>\n", "one\ntwo\n")


class TestContiguous:
    @staticmethod
    def check(corpus, text=TEXT):
        assert "".join(texts(corpus)) == text
        for part, fraction in zip(texts(corpus), (0.9, 0.05, 0.05), strict=True):
            assert part.endswith(text[-1])
            assert len(part) == pytest.approx(fraction * len(text), abs=2 * len(SENTENCES[-1]))

    @pytest.mark.parametrize(
        ("name", "text"),
        [("train.txt", TEXT), ("book.xz", TEXT), ("one_line", "word " * 997)],
        ids=["plain", "packed", "cut between words"],
    )
    def test_single_file(self, tmp_path, name, text):
        corpus = load_corpus(write(tmp_path, {name: text}) / name)
        assert corpus.name == name
        self.check(corpus, text)

    @pytest.mark.parametrize(
        "names",
        [("a.txt", "b/a.rst", "b/wiki_00", "c.md"), ("test/case.py", "test_a.py", "train.py", "valid.py")],
        ids=["text", "source code"],
    )
    def test_folder_is_joined_in_sorted_order(self, tmp_path, names):
        write(tmp_path, {name: "".join(SENTENCES[100 * i : 100 * (i + 1)]) for i, name in enumerate(names)})
        write(tmp_path, {".hidden": "hidden\n", "picture.png": b"\x89PNG\0"})
        (tmp_path / names[0]).parent.joinpath("loop").symlink_to(tmp_path, target_is_directory=True)
        self.check(load_corpus(tmp_path))

    def test_home_and_relative_paths(self, tmp_path, monkeypatch):
        write_splits(tmp_path / "wikitext-2", train="a\n", valid="b\n", test="c\n")
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("HOME", str(tmp_path))
        assert load_corpus("./wikitext-2") == load_corpus("~/wikitext-2") == load_corpus("$HOME/wikitext-2")
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

    def test_splits_have_sums_of_their_own(self, folder):
        corpus = load_corpus(folder, preparation="published")
        assert load_corpus(folder, preparation="published") == corpus
        assert len({tuple(re.findall("Calc.*", text)[:20]) for text in texts(corpus)}) == 3

    def test_takes_the_first_bytes_of_each_split(self, tmp_path, monkeypatch):
        assert corpora._PUBLISHED_BYTES == 20_000_000
        monkeypatch.setattr(corpora, "_PUBLISHED_CALC_PROBABILITY", 0.0)
        monkeypatch.setattr(corpora, "_PUBLISHED_BYTES", 32)
        folder = write_splits(tmp_path, **dict.fromkeys(("train", "valid", "test"), "ü" * 12 + "\n" + "é" * 30 + "\n"))
        # 24 bytes and a newline leave 7 bytes, which are three letters: a line too short to stay.
        assert load_corpus(folder, preparation="published").train == "ü" * 12 + "\n"
        monkeypatch.setattr(corpora, "_PUBLISHED_BYTES", 50)
        assert load_corpus(folder, preparation="published").test == "ü" * 12 + "\n" + "é" * 12 + "\n"


def test_max_bytes_cuts_at_line_boundaries(tmp_path):
    line = "äöü line\n"  # 12 bytes
    folder = write_splits(tmp_path, train=line * 10, valid=line * 3, test="x" * 90 + "\nsecond\n")
    assert texts(load_corpus(folder, max_bytes=35)) == (line * 2, line * 2, "x" * 35)
    assert load_corpus(folder, max_bytes=36).train == line * 3
    assert load_corpus(folder, max_bytes=10**6).train == line * 10


class TestMaxBytesOfCompressedFiles:
    """The same text as of plain files, without unpacking what is not asked for."""

    @pytest.mark.parametrize("suffix", PACK)
    @pytest.mark.parametrize("splits", [("train", "valid", "test"), ("train", "valid"), ("train", "test"), ("train",)])
    def test_as_plain_files(self, tmp_path, suffix, splits):
        doc = "\r\n".join([f"<doc id=7 url={'x' * 60}>", "Title, größer", "é" * 40, "</doc>"]) + "\r\n"
        content = {split: "\ufeff" + doc * 9 + split for split in splits}
        plain = write_splits(tmp_path / "plain", **content)
        packed = write_splits(tmp_path / "packed", f".txt{suffix}", **content)
        for max_bytes in (*range(20, 420, 3), 10**6):
            expected, found = (load_corpus(folder, max_bytes=max_bytes) for folder in (plain, packed))
            assert found.sha256 == expected.sha256, max_bytes

    @pytest.mark.parametrize("suffix", PACK)
    def test_no_more_is_unpacked_than_asked_for(self, tmp_path, suffix):
        content = {"train": "a line of text\n" * 1_000_000, "valid": "v\n" * 99, "test": "t\n" * 99}
        folder = write_splits(tmp_path, suffix, **content)
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
        folder = write_splits(tmp_path, ".xz", train=text, valid=text, test=text)
        assert "longer than ten\n" in load_corpus(folder, preparation="published", max_bytes=40).train

    @pytest.mark.parametrize("layout", ["file", "folder", "train alone"])
    def test_one_that_is_cut_in_proportion_has_a_most(self, tmp_path, monkeypatch, layout):
        monkeypatch.setattr(text_files, "_MOST_UNPACKED", 5000)
        name = "train.xz" if layout == "train alone" else "text.xz"
        path = write(tmp_path, {name: TEXT}) / (name if layout == "file" else "")
        for max_bytes in (None, len(TEXT) // 99):
            assert load_corpus(path, max_bytes=max_bytes).train
        message = r"unpack to at most 5,000 bytes where max_bytes is given, got more from .*xz"
        with pytest.raises(ValueError, match=message):
            load_corpus(path, max_bytes=10)


class TestErrors:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"preparation": "odd"}, r"preparation must be one of \('plain', 'published'\), got 'odd'"),
            ({"max_bytes": 0}, "max_bytes must be None or at least 1, got 0"),
        ],
    )
    def test_arguments(self, options, message):
        with pytest.raises(ValueError, match=message):
            load_corpus("embedded", **options)

    @pytest.mark.parametrize("name", ["pipe", "train.txt", "train.txt.xz"])
    def test_pipe(self, tmp_path, name):
        os.mkfifo(tmp_path / name)
        (tmp_path / "folder").mkdir()
        (tmp_path / "folder" / "train.txt").symlink_to(tmp_path / name)
        for spec in (tmp_path / name, tmp_path / "folder"):
            with pytest.raises(ValueError, match="corpus must be regular files, got a pipe or a device: "):
                load_corpus(spec)

    @pytest.mark.parametrize(
        ("spec", "error", "message"),
        [
            (
                "wiki",
                OSError,
                "be one of embedded, wikitext-2, wikitext-103, or a path to text files, got .* not there: wiki$",
            ),
            ("no/such/folder", OSError, "not there: no/such/folder$"),
            (" ", OSError, "not there:  $"),
            ("${NOWHERE}/wikitext-2", ValueError, "the environment variable NOWHERE is not set"),
            ("/dev/zero", ValueError, "got a pipe or a device: /dev/zero"),
        ],
    )
    def test_no_corpus(self, spec, error, message, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        monkeypatch.delenv("NOWHERE", raising=False)
        with pytest.raises(error, match=message):
            load_corpus(spec)

    @pytest.mark.parametrize("files", [{}, {"image.png": b"\x89PNG\0"}])
    def test_folder_without_text(self, tmp_path, files):
        with pytest.raises(ValueError, match="folder with text files, got none"):
            load_corpus(write(tmp_path, files))

    @pytest.mark.parametrize("text", ["", "\n", "x"])
    def test_empty_or_tiny_file(self, tmp_path, text):
        with pytest.raises(ValueError, match="empty train split"):
            load_corpus(write(tmp_path, {"f.txt": text}) / "f.txt")

    @pytest.mark.parametrize("split", ["train", "valid", "test"])
    @pytest.mark.parametrize(("preparation", "text"), [("plain", " \n"), ("published", "short\n")])
    def test_empty_split(self, tmp_path, split, preparation, text):
        write_splits(tmp_path, **{"train": TEXT, "valid": TEXT, "test": TEXT, split: text})
        with pytest.raises(ValueError, match=f"got an empty {split} split"):
            load_corpus(tmp_path, preparation=preparation)

    @pytest.mark.parametrize("data", [b"text\0text\n", "caf\xe9\n".encode("latin-1")])
    @pytest.mark.parametrize("name", ["train.bin", "notes.txt"])
    def test_binary(self, tmp_path, data, name):
        for spec in (write(tmp_path, {name: data}), tmp_path / name):
            with pytest.raises(ValueError, match=rf"binary file.*{name}"):
                load_corpus(spec)

    @pytest.mark.parametrize("suffix", PACK)
    @pytest.mark.parametrize("damage", ["cut off", "other", "dangling link"])
    def test_unreadable(self, tmp_path, suffix, damage):
        file = tmp_path / f"train.txt{suffix}"
        if damage == "dangling link":
            file.symlink_to(tmp_path / "gone")
        else:
            file.write_bytes(PACK[suffix](TEXT.encode())[:-20] if damage == "cut off" else b"something else")
        with pytest.raises(ValueError, match=r"corpus must be readable files, got .*train\.txt"):
            load_corpus(tmp_path)


class TestSharedData:
    def test_wikitext_2_is_byte_exact(self, shared_data):
        corpus = load_corpus(shared_data / "wikitext-2")
        assert corpus.sha256 == "c6dd4b9cc8e958db7613353551ee8542b937b1b35de9152e68636d550207ee11"
        sums = [hashlib.sha256(text.encode()).hexdigest()[:8] for text in texts(corpus)]
        assert sums == ["9e9fa1ad", "f0737ed3", "d790b833"]

    def test_enwiki_validation_part(self, shared_data):
        corpus = load_corpus(shared_data / "enwiki-2015" / "enwiki.valid.txt", preparation="published")
        assert "<doc " not in corpus.train
        assert corpus.train.startswith("George, Margrave of Brandenburg-Ansbach\n")
        assert "\n\n" not in corpus.train
