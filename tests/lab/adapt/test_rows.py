import json
import os

import pytest

from torchdsc.lab.adapt.config import Task
from torchdsc.lab.adapt.rows import read_source

GOOD = '{"text": "good", "label": 1}\n'


def read(path, **task):
    return read_source(Task("t", str(path), **task), str(path))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("[1, 2]", r"must be a JSON object, got \[1, 2\]"),
        ("5", "must be a JSON object, got 5"),
        ("null", "must be a JSON object, got nothing"),
        ('"good"', "must be a JSON object, got 'good'"),
        ("{oops", "must be JSON: Expecting"),
        ("[" * 100_000, "must be JSON: maximum recursion"),
        ('{"text": "bad"}', r"must have a column 'label', got \['text'\]"),
        ('{"text": "bad", "label": [1]}', r"column 'label', must be the name or number of a class, got \[1\]"),
        ('{"text": "bad", "label": {}}', "column 'label', must be the name or number of a class, got {}"),
        ('{"text": "bad", "label": null}', "column 'label', must be the name or number of a class, got nothing"),
        ('{"text": "bad", "label": NaN}', "column 'label', must be the name or number of a class, got nan"),
        ('{"text": "bad", "label": Infinity}', "column 'label', must be the name or number of a class, got inf"),
        ('{"text": "bad", "label": " "}', "column 'label', must be the name or number of a class, got ' '"),
        ('{"text": "bad", "label": "NaN"}', "column 'label', must be the name or number of a class, got 'NaN'"),
        ('{"text": ["bad"], "label": 0}', r"column 'text', must be text, got \['bad'\]"),
        ('{"text": {"a": 1}, "label": 0}', "column 'text', must be text, got {'a': 1}"),
        ('{"text": 5, "label": 0}', "column 'text', must be text, got 5"),
        ('{"text": null, "label": 0}', "column 'text', must be text, got nothing"),
        ('{"text": "", "label": 0}', "column 'text', must be text, got ''"),
    ],
)
def test_json_lines(tmp_path, line, message):
    (tmp_path / "a.jsonl").write_text(GOOD + "\n" + line + "\n" + GOOD)
    with pytest.raises(ValueError, match=rf"a\.jsonl, line 3, {message}"):
        read(tmp_path / "a.jsonl")


@pytest.mark.parametrize(
    "value", ["NaN", "Infinity", "-Infinity", "1e39", "9" * 400, "true", "[1]", '"much"', '""', "null"]
)
def test_targets_of_a_regression(tmp_path, value):
    (tmp_path / "a.jsonl").write_text(GOOD + f'{{"text": "bad", "label": {value}}}\n')
    with pytest.raises(ValueError, match=r"a\.jsonl, line 2, column 'label', must be a finite number, got "):
        read(tmp_path / "a.jsonl", kind="regression")
    (tmp_path / "a.jsonl").write_text(GOOD + '{"text": "bad", "label": "2.5"}\n')
    assert [e.label for e in read(tmp_path / "a.jsonl", kind="regression").examples] == [1.0, 2.5]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"text,label,text\na,1,b\n", "line 1, must be different columns, got 'text' more than once"),
        (b"text,label\na,1\n\nb\n", r"line 4, must have 2 fields, \['text', 'label'\], got 1"),
        (b"text,label\na,1\nb,2,3\n", r"line 3, must have 2 fields, \['text', 'label'\], got 3"),
        (b'text,label\na,1\n"b,2\n', "line 3, must be a table: unexpected end of data"),
        (b'text,label\na,1\n"b"c,2\n', "line 3, must be a table"),
        (b"text,label\na,1\nb, \n", "line 3, column 'label', must be the name or number of a class, got ' '"),
        (b"text,label\na,1\nb,nan\n", "line 3, column 'label', must be the name or number of a class, got 'nan'"),
        (b"text,label\na,1\n\xff\xfe,2\n", r"line 3, must be UTF-8, got b'\\xff'"),
    ],
)
def test_tables(tmp_path, content, message):
    (tmp_path / "a.csv").write_bytes(content)
    with pytest.raises(ValueError, match=rf"a\.csv, {message}"):
        read(tmp_path / "a.csv")


def test_long_fields(tmp_path):
    (tmp_path / "a.csv").write_text(f"text,label\n{'good ' * 100_000},1\n")
    (tmp_path / "a.tsv").write_text(f"text\tlabel\n{'good ' * 100_000}\t1\n")
    for name in ("a.csv", "a.tsv"):
        assert len(read(tmp_path / name).examples[0].texts[0]) == 500_000


def test_suffixes_of_any_case(tmp_path):
    for name, content in (("A.CSV", "text,label\ngood,1\n"), ("A.TSV", "text\tlabel\ngood\t1\n"), ("A.JsonL", GOOD)):
        (tmp_path / name).write_text(content)
        (example,) = read(tmp_path / name).examples
        assert (example.texts, example.label) == (["good"], "1")


@pytest.mark.parametrize("name", ["reviews", "reviews.dat", "reviews.csv.bak", "reviews.parquet"])
def test_other_suffixes(tmp_path, name):
    (tmp_path / name).write_text(GOOD)
    with pytest.raises(
        ValueError, match=r"must be a file \(.csv, .tsv, .jsonl, .txt\) or the id of a data set, got a file"
    ):
        read(tmp_path / name)


def test_what_is_no_file(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "pipe.csv")
    for name in (".", "pipe.csv"):
        with pytest.raises(ValueError, match=r"must be a file .* or the id of a data set, got something else"):
            read(tmp_path / name)
    for name in (tmp_path / "a.csv", tmp_path / "reviews", "./a/b", "a/b/c/d/e"):
        with pytest.raises(FileNotFoundError, match="No such file"):
            read(name)

    def load_dataset(*names, split):
        raise FileNotFoundError("not on the hub")

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    with pytest.raises(OSError, match=r"nobody/none must be a file or the id of a data set .*, got: not on the hub"):
        read("nobody/none")


@pytest.mark.parametrize(
    ("name", "content"),
    [("a.csv", ""), ("a.csv", "text,label\n"), ("a.jsonl", "\n\n"), ("a.tsv", "\ufeff"), ("a.txt", " \n")],
)
def test_no_row(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match="must hold at least one row, got none"):
        read(tmp_path / name, kind="causal_lm")


def test_blank_lines_of_a_longer_text(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "good"}\n{"text": ""}\n{"text": "bad"}\n')
    assert [e.texts for e in read(tmp_path / "a.jsonl", kind="causal_lm").examples] == [["good"], [""], ["bad"]]


def test_digest_is_of_the_content(tmp_path, monkeypatch):
    (tmp_path / "a.jsonl").write_text(GOOD)
    first = read(tmp_path / "a.jsonl").sha256
    (tmp_path / "a.jsonl").write_text(GOOD.replace("1", "0"))
    assert read(tmp_path / "a.jsonl").sha256 != first

    rows = [json.loads(GOOD)]
    monkeypatch.setattr("datasets.load_dataset", lambda *names, split: rows)
    first = read("user/reviews").sha256
    rows[0]["label"] = 0
    assert read("user/reviews").sha256 != first
