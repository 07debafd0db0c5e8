import pytest
import torch
from transformers import AutoTokenizer

from torchdsc.lab.adapt.config import Task
from torchdsc.lab.adapt.data import load_task


def load(encoder, validation_examples=8, max_length=16, **task):
    task = {"name": "t", "text": ["sentence"], **task}
    tokenizer = AutoTokenizer.from_pretrained(encoder)
    return load_task(Task(**task), tokenizer, max_length=max_length, validation_examples=validation_examples)


@pytest.mark.parametrize("name", ["train.tsv", "train.csv", "train.jsonl"])
def test_formats_give_the_same_labels(encoder, reviews, name):
    data = load(encoder, train=str(reviews / name))
    assert (len(data.train), len(data.validation), len(data.evaluation)) == (48, 8, 8)
    assert data.labels == ["0", "1"]
    every = data.train.rows + data.validation.rows + data.evaluation.rows
    assert sorted(row["labels"] for row in every) == [0] * 32 + [1] * 32
    # The first word tells the label: rows and labels have stayed together.
    assert {(row["input_ids"][0], row["labels"]) for row in data.train.rows} == {(3, 1), (4, 0)}
    assert len(data.sha256) == 1


def test_columns_of_a_file_without_header(encoder, reviews):
    data = load(encoder, train=str(reviews / "bare.tsv"), columns=["sentence", "label"])
    assert len(data.train) + len(data.validation) + len(data.evaluation) == 64


def test_quotes_are_text_in_tsv_and_quotes_in_csv(encoder, tmp_path):
    (tmp_path / "a.tsv").write_text('sentence\tlabel\n"good film\t1\nbad "\t0\nbad\t0\n')
    (tmp_path / "a.csv").write_text('sentence,label\n"good, film",1\nbad,0\nit,0\n')
    for name, length in (("a.tsv", 3), ("a.csv", 3)):
        data = load(encoder, 1, train=str(tmp_path / name))
        rows = data.train.rows + data.validation.rows + data.evaluation.rows
        assert max(len(row["input_ids"]) for row in rows) == length


def test_split_does_not_depend_on_anything_but_the_rows(encoder, reviews):
    torch.manual_seed(1)
    first = load(encoder, train=str(reviews / "train.tsv"))
    torch.manual_seed(2)
    second = load(encoder, train=str(reviews / "train.jsonl"), max_train=10)
    assert first.train.rows[:10] == second.train.rows
    assert first.validation.rows == second.validation.rows


def test_evaluation_file_and_limits(encoder, reviews):
    train, dev = str(reviews / "train.tsv"), str(reviews / "dev.tsv")
    data = load(encoder, train=train, evaluation=dev, max_train=5, max_evaluation=2)
    assert (len(data.train), len(data.evaluation), len(data.sha256)) == (5, 2, 2)
    # What an evaluation file takes from train is what would be held out without one, less the part for the score.
    alone, beside = load(encoder, train=train), load(encoder, train=train, evaluation=dev)
    assert alone.validation.rows == beside.validation.rows
    assert alone.train.rows == beside.train.rows[8:]


def test_regression_standardises_by_train(encoder, reviews):
    data = load(
        encoder, train=str(reviews / "scores.tsv"), kind="regression", text=["sentence1", "sentence2"], label="score"
    )
    values = torch.tensor([row["labels"] for row in data.train.rows])
    assert values.mean().abs() < 1e-6
    assert values.std(unbiased=False) == pytest.approx(1.0)
    assert len(data.labels) == 1
    original = sorted({round(v * data.scale[1] + data.scale[0], 6) for v in values.tolist()})
    assert original == [0.0, 5.0]


def test_text_in_blocks(decoder, reviews):
    task = {"train": str(reviews / "prose.txt"), "kind": "causal_lm", "text": ["text"]}
    data = load(decoder, 4, 16, **task, retain=str(reviews / "old.txt"))
    assert all(len(row["input_ids"]) == 16 for row in data.train.rows)
    assert data.train.rows[0]["labels"].equal(data.train.rows[0]["input_ids"])
    assert len(data.retain) == 200 // 16
    tokens = len(AutoTokenizer.from_pretrained(decoder)((reviews / "prose.txt").read_text())["input_ids"])
    assert len(data.train) + len(data.validation) + len(data.evaluation) == tokens // 16


class TestErrors:
    def test_missing_column(self, encoder, reviews):
        with pytest.raises(ValueError, match=r"line 2, must have a column 'review', got \['sentence', 'label'\]"):
            load(encoder, train=str(reviews / "train.tsv"), text=["review"])

    def test_label_not_in_train(self, encoder, reviews, tmp_path):
        (tmp_path / "dev.tsv").write_text("sentence\tlabel\ngood\t7\n")
        with pytest.raises(
            ValueError, match=r"line 2, column 'label', must be a label of train, \['0', '1'\], got '7'"
        ):
            load(encoder, train=str(reviews / "train.tsv"), evaluation=str(tmp_path / "dev.tsv"))

    def test_metric_of_two_labels(self, encoder, tmp_path):
        (tmp_path / "a.tsv").write_text("sentence\tlabel\n" + "good\ta\nbad\tb\nfilm\tc\n" * 8)
        with pytest.raises(ValueError, match=r"must be accuracy where labels are not two, got \['a', 'b', 'c'\]"):
            load(encoder, train=str(tmp_path / "a.tsv"), metric="f1")

    def test_label_no_number(self, encoder, tmp_path):
        (tmp_path / "a.tsv").write_text("sentence\tlabel\n" + "good\tx\n" * 20)
        with pytest.raises(ValueError, match=r"a\.tsv, line 2, column 'label', must be a finite number, got 'x'"):
            load(encoder, train=str(tmp_path / "a.tsv"), kind="regression")

    @pytest.mark.parametrize("kind", ["classification", "regression"])
    def test_labels_that_are_all_alike(self, encoder, tmp_path, kind):
        (tmp_path / "a.tsv").write_text("sentence\tlabel\n" + "good\t1\n" * 20)
        with pytest.raises(ValueError, match="train of task 't' must have two labels or more, got '1"):
            load(encoder, 2, train=str(tmp_path / "a.tsv"), kind=kind)

    def test_evaluation_without_rows(self, encoder, reviews, tmp_path):
        (tmp_path / "dev.tsv").write_text("sentence\tlabel\n")
        with pytest.raises(ValueError, match=r"dev\.tsv must hold at least one row, got none"):
            load(encoder, train=str(reviews / "train.tsv"), evaluation=str(tmp_path / "dev.tsv"))

    def test_too_few_examples(self, encoder, reviews):
        with pytest.raises(ValueError, match="must hold more than 64 held-out examples, got 64"):
            load(encoder, 32, train=str(reviews / "train.tsv"))
        with pytest.raises(ValueError, match="must hold at least 4096 tokens"):
            load(encoder, 1, 4096, train=str(reviews / "prose.txt"), kind="causal_lm", text=["text"])

    def test_bad_json_line(self, encoder, tmp_path):
        (tmp_path / "a.jsonl").write_text('{"sentence": "good", "label": 1}\n{oops\n')
        with pytest.raises(ValueError, match="line 2, must be JSON"):
            load(encoder, 1, train=str(tmp_path / "a.jsonl"))

    def test_variable_that_is_not_set(self, encoder, monkeypatch):
        monkeypatch.delenv("NOWHERE", raising=False)
        with pytest.raises(ValueError, match="the environment variable NOWHERE is not set"):
            load(encoder, train="${NOWHERE}/a.tsv")

    def test_no_file(self, encoder, tmp_path):
        with pytest.raises(FileNotFoundError):
            load(encoder, train=str(tmp_path / "none.tsv"))


def test_data_set_of_the_hub(encoder, monkeypatch):
    asked = []

    def load_dataset(*names, split):
        asked.append((*names, split))
        return [{"sentence": f"good film {index}", "label": index % 2} for index in range(20)]

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    data = load(encoder, 4, train="user/reviews/small:train[:20]", evaluation="user/reviews")
    assert asked == [("user/reviews", "small", "train[:20]"), ("user/reviews", "train")]
    assert (len(data.train), len(data.evaluation), len(data.sha256)) == (16, 20, 2)
