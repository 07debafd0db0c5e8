import hashlib
import json
import os
from functools import partial

import pytest

from torchdsc.lab.data.rows import Example, read_numbers, read_source

GOOD = '{"text": "good", "label": 1}\n'
CLASS = "column 'label', must be the name or number of a class, got"


def read(path, kind="classification", **options):
    return read_source(str(path), kind=kind, text=["text"], label="label", **options)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("[1, 2]", r"must be a JSON object, got \[1, 2\]"),
        ("null", "must be a JSON object, got nothing"),
        ("{oops", "must be JSON, Expecting"),
        ("[" * 100_000, "must be JSON, maximum recursion"),
        ('{"text": "a", "text": "b"}', r"must be JSON, columns must be different, got \['text', 'text'\]"),
        ('{"text": "bad"}', r"must have a column 'label', got \['text'\]"),
        ('{"text": "bad", "label": [1]}', rf"{CLASS} \[1\]"),
        ('{"text": "bad", "label": null}', f"{CLASS} nothing"),
        ('{"text": "bad", "label": Infinity}', f"{CLASS} inf"),
        ('{"text": "bad", "label": " "}', f"{CLASS} ' '"),
        ('{"text": "bad", "label": "NaN"}', f"{CLASS} 'NaN'"),
        ('{"text": ["bad"], "label": 0}', r"column 'text', must be text, got \['bad'\]"),
        ('{"text": 5, "label": 0}', "column 'text', must be text, got 5"),
        ('{"text": null, "label": 0}', "column 'text', must be text, got nothing"),
        ('{"text": "", "label": 0}', "column 'text', must be text, got ''"),
    ],
)
def test_json_lines(tmp_path, line, message):
    (tmp_path / "a.jsonl").write_text(GOOD + "\n" + line + "\n" + GOOD)
    with pytest.raises(ValueError, match=rf"a\.jsonl, line 3, {message}"):
        read(tmp_path / "a.jsonl")


@pytest.mark.parametrize("value", ["NaN", "-Infinity", "1e39", "9" * 400, "true", "[1]", '"much"', '""', "null"])
def test_targets_of_a_regression(tmp_path, value):
    (tmp_path / "a.jsonl").write_text(GOOD + f'{{"text": "bad", "label": {value}}}\n')
    with pytest.raises(ValueError, match=r"a\.jsonl, line 2, column 'label', must be a finite number, got "):
        read(tmp_path / "a.jsonl", "regression")
    (tmp_path / "a.jsonl").write_text(GOOD + '{"text": "bad", "label": "2.5"}\n')
    assert [row.label for row in read(tmp_path / "a.jsonl", "regression")[0]] == [1.0, 2.5]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"text,label,text\na,1,b\n", r"line 1, columns must be different, got \['text', 'label', 'text'\]"),
        (b"text,label\na,1\n\nb\n", r"line 4, must have 2 fields, \['text', 'label'\], got 1"),
        (b"text,label\na,1\nb,2,3\n", r"line 3, must have 2 fields, \['text', 'label'\], got 3"),
        (b'text,label\na,1\n"b,2\n', "line 3, must be a table: unexpected end of data"),
        (b'text,label\na,1\n"b"c,2\n', "line 3, must be a table"),
        (b"text,label\na,1\nb, \n", f"line 3, {CLASS} ' '"),
        (b"text,label\na,1\n\xff\xfe,2\n", r"line 3, must be UTF-8, got b'\\xff'"),
    ],
)
def test_tables(tmp_path, content, message):
    (tmp_path / "a.csv").write_bytes(content)
    with pytest.raises(ValueError, match=rf"a\.csv, {message}"):
        read(tmp_path / "a.csv")


def test_quotation_marks_are_text_in_tsv_alone(tmp_path):
    (tmp_path / "a.tsv").write_text('\ufefftext\tlabel\n"good film\t1\nbad "\t0\n')
    (tmp_path / "a.csv").write_text('\ufefftext,label\n"good,\r\nfilm",1\nbad,0\n')
    texts = {suffix: [row.texts for row in read(tmp_path / f"a.{suffix}")[0]] for suffix in ("tsv", "csv")}
    assert texts == {"tsv": [['"good film'], ['bad "']], "csv": [["good,\r\nfilm"], ["bad"]]}


@pytest.mark.parametrize("suffix", ["csv", "tsv", "jsonl", "parquet"])
def test_values_stay_as_they_are_written(tmp_path, suffix):
    values = ["NA", "None", "007", "1.0", "true", "2020-01-01", "1e5", "null", "#N/A", " x ", "good " * 100_000]
    columns = {"text": [*values, "nan"], "label": [*values, "0"]}
    rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    file = tmp_path / f"A.{suffix.upper()}"
    if suffix == "parquet":
        pyarrow = pytest.importorskip("pyarrow")
        pytest.importorskip("pyarrow.parquet").write_table(pyarrow.table(columns), file)
    elif suffix == "jsonl":
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        separator = {"csv": ",", "tsv": "\t"}[suffix]
        file.write_text("".join(separator.join(row) + "\n" for row in [columns, *map(dict.values, rows)]))
    examples, _ = read(file)
    assert [row.texts for row in examples] == [[text] for text in columns["text"]]
    assert [row.label for row in examples] == columns["label"]


def test_parquet(tmp_path):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    write = partial(parquet.write_table, where=tmp_path / "a.parquet")
    write(pyarrow.table({"text": ["good", "bad"], "label": [1, None]}))
    with pytest.raises(ValueError, match=rf"a\.parquet, row 2, {CLASS} nothing"):
        read(tmp_path / "a.parquet")
    write(pyarrow.table([["good"], ["bad"]], names=["text", "text"]))
    with pytest.raises(ValueError, match=r"a\.parquet, must be parquet, Multiple matches"):
        read(tmp_path / "a.parquet")
    (tmp_path / "a.parquet").write_text(GOOD)
    with pytest.raises(ValueError, match=r"a\.parquet, must be parquet, "):
        read(tmp_path / "a.parquet")


def test_what_is_no_such_file(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "pipe.csv")
    (tmp_path / "reviews.csv.bak").write_text(GOOD)
    for name, what in ((".", "something else"), ("pipe.csv", "something else"), ("reviews.csv.bak", "a file with")):
        with pytest.raises(ValueError, match=rf"must be a file \(.csv, .*\) or the id of a data set, got {what}"):
            read(tmp_path / name)
    for name in (tmp_path / "a.csv", tmp_path / "reviews", "./a/b", "a/b/c/d/e"):
        with pytest.raises(FileNotFoundError, match="No such file"):
            read(name)


@pytest.mark.parametrize(
    ("name", "content"),
    [("a.csv", ""), ("a.csv", "text,label\n"), ("a.jsonl", "\n\n"), ("a.tsv", "\ufeff"), ("a.txt", " \n")],
)
def test_no_row(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=r"/a\.\w+ must hold at least one row, got none"):
        read(tmp_path / name, "causal_lm")


@pytest.mark.parametrize("name", ["a.txt", "wiki.test.raw", "wiki.valid.tokens"])
def test_a_text_is_one_row(tmp_path, name):
    (tmp_path / name).write_text('First line.\n\nSecond, "quoted".\n')
    [row], _ = read(tmp_path / name, "causal_lm")
    assert row.texts == ['First line.\n\nSecond, "quoted".\n']


def test_blank_lines_of_a_longer_text(tmp_path):
    content = '{"text": "good"}\n{"text": ""}\n{"text": "bad"}\n'
    (tmp_path / "a.jsonl").write_text(content)
    rows, digest = read(tmp_path / "a.jsonl", "causal_lm")
    assert [row.texts for row in rows] == [["good"], [""], ["bad"]]
    assert digest == hashlib.sha256(content.encode()).hexdigest()


def test_data_sets_of_the_hub(monkeypatch):
    rows = [json.loads(GOOD)]
    monkeypatch.setattr("datasets.load_dataset", lambda *names, split: rows)
    examples, digest = read("user/reviews")
    assert examples == [Example("user/reviews, row 1", ["good"], "1")]
    rows[0]["label"] = 0
    assert read("user/reviews")[1] != digest


class TestNumbers:
    def test_columns(self, tmp_path, monkeypatch):
        monkeypatch.setenv("HERE", str(tmp_path))
        (tmp_path / "a.csv").write_bytes(b"\xef\xbb\xbfx,date,y\r\n1,2016-07-01,-2e1\r\n\r\n0.5,2016-07-02,7\r\n")
        numbers, sha256 = read_numbers("${HERE}/a.csv", beside="date")
        assert numbers == {"x": [1.0, 0.5], "y": [-20.0, 7.0]}
        assert sha256 == hashlib.sha256((tmp_path / "a.csv").read_bytes()).hexdigest()

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("date,x\n1,\n", r"a\.csv, line 2, column 'x', must be a finite number, got ''"),
            ("date,x\n1,2\n2,much\n", r"a\.csv, line 3, column 'x', must be a finite number, got 'much'"),
            ("date,x\n1,NaN\n", r"a\.csv, line 2, column 'x', must be a finite number, got 'NaN'"),
            ("date,x\n ,2\n", r"a\.csv, line 2, column 'date', must not be blank, got ' '"),
            ("date,x\n1\n", r"a\.csv, line 2, must have 2 fields, \['date', 'x'\], got 1"),
            ("day,x\n1,2\n", r"a\.csv, line 2, must have a column 'date', got \['day', 'x'\]"),
            ("date\n1\n", r"a\.csv must hold at least one row, and a column of numbers beside 'date', got none"),
            ("date,x\n", r"a\.csv must hold at least one row, and a column of numbers beside 'date', got none"),
        ],
    )
    def test_errors(self, tmp_path, text, message):
        (tmp_path / "a.csv").write_text(text)
        with pytest.raises(ValueError, match=message):
            read_numbers(str(tmp_path / "a.csv"), beside="date")
