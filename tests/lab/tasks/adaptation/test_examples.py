import pytest
import torch

from torchdsc.lab.tasks.adaptation.base import load_tokenizer
from torchdsc.lab.tasks.adaptation.examples import load_data


@pytest.fixture
def load(settings):
    def make(**changes):
        chosen = settings(**changes)
        return load_data(chosen, load_tokenizer(chosen))

    return make


def every(data):
    return data.train + data.validation + data.evaluation


@pytest.mark.parametrize(
    ("name", "columns"),
    [("train.tsv", None), ("train.csv", None), ("train.jsonl", None), ("bare.tsv", ["sentence", "label"])],
)
def test_formats_give_the_same_labels(load, reviews, name, columns):
    source = str(reviews / name)
    data = load(train=source, columns=columns)
    assert (len(data.train), len(data.validation), len(data.evaluation)) == (48, 8, 8)
    assert data.labels == ["0", "1"]
    assert sorted(row["labels"] for row in every(data)) == [0] * 32 + [1] * 32
    # The first word tells the label: rows and labels have stayed together.
    assert {(row["input_ids"][0], row["labels"]) for row in data.train} == {(3, 1), (4, 0)}
    assert list(data.hashes) == [source]


def test_split_does_not_depend_on_anything_but_the_rows(load, reviews):
    torch.manual_seed(1)
    first = load()
    torch.manual_seed(2)
    second = load(train=str(reviews / "train.jsonl"), max_train=10)
    assert first.train[:10] == second.train
    assert first.validation == second.validation


def test_evaluation_file_and_limits(load, reviews):
    dev = str(reviews / "dev.tsv")
    data = load(evaluation=dev, max_train=5, max_evaluation=2)
    assert (len(data.train), len(data.evaluation), len(data.hashes)) == (5, 2, 2)
    # What an evaluation file takes from train is what would be held out without one, less the part for the score.
    alone, beside = load(), load(evaluation=dev)
    assert alone.validation == beside.validation
    assert alone.train == beside.train[8:]


def test_regression_standardises_by_train(load, pairs):
    data = load(**pairs)
    values = torch.tensor([row["labels"] for row in data.train])
    assert values.mean().abs() < 1e-6
    assert values.std(unbiased=False) == pytest.approx(1.0)
    assert data.labels == ["score"]
    assert sorted({round(v * data.scale[1] + data.scale[0], 6) for v in values.tolist()}) == [0.0, 5.0]


def test_text_in_blocks(load, prose, settings, reviews):
    data = load(**prose, retain=str(reviews / "old.txt"))
    chosen = settings(**prose)
    ids = load_tokenizer(chosen)((reviews / "prose.txt").read_text())["input_ids"]
    blocks = torch.tensor(ids)[: len(ids) // 16 * 16].view(-1, 16)
    # In the order of the text, the end for the score.
    assert torch.stack([row["input_ids"] for row in every(data)]).equal(blocks)
    assert (len(data.validation), len(data.evaluation), data.retain.num_evaluated) == (4, 4, 200 // 16)
    assert data.train[0]["labels"].equal(data.train[0]["input_ids"])
    beside = load(**prose, evaluation=str(reviews / "old.txt"))
    assert torch.stack([row["input_ids"] for row in beside.train + beside.validation]).equal(blocks)
    [old] = data.retain.blocks.values()
    assert beside.evaluation[0]["input_ids"].equal(old[0]["input_ids"])


def test_old_domains(load, prose, reviews):
    sources = [str(reviews / name) for name in ("old.txt", "prose.txt")]
    data = load(**prose, retain=sources, max_evaluation=6, choices=5, replay=0.25)
    plain = load(**prose)
    assert list(data.hashes) == [prose["train"], sources[0]]
    assert {source: len(blocks) for source, blocks in data.retain.blocks.items()} == dict.fromkeys(sources, 6)
    assert data.retain.num_evaluated == 2 * (6 + 5)
    # A quarter of all is replayed: of each text in turn, and nothing that is evaluated.
    replayed = data.train[len(plain.train) :]
    assert len(replayed) == round(len(plain.train) / 3)
    evaluated = [block["input_ids"] for blocks in data.retain.blocks.values() for block in blocks]
    assert not any(block is other["input_ids"] for block in evaluated for other in replayed)
    assert plain.train[6]["input_ids"].equal(load(**prose, retain=sources[1]).train[6]["input_ids"])
    # All of a long text is replayed, beside a short one.
    (reviews / "brief.txt").write_text("the film was very good " * 30)
    sources = [str(reviews / "brief.txt"), sources[1]]
    data = load(**prose, retain=sources, max_evaluation=6, replay=0.9)
    brief, long = (len(rest) for rest in data.retain.rest.values())
    replayed = {id(row) for row in data.train[len(plain.train) :]}
    assert brief < 5 < long
    assert len(replayed) == brief + long
    with pytest.raises(ValueError, match=r"max_evaluation must leave blocks of .*brief.txt to train on, got None"):
        load(**prose, retain=sources, replay=0.25)


def test_questions(load, prose, reviews):
    data = load(**prose, max_length=32, retain=prose["train"], max_evaluation=9, choices=3)
    [blocks], [questions] = data.retain.blocks.values(), data.retain.questions.values()
    assert questions.shape == (3, 4, 8 + 8)
    for place, question in enumerate(questions):
        # The right answer first; the beginning is always its own, the others' answers are of other blocks.
        assert question[0].equal(blocks[place]["input_ids"][:16])
        assert all(choice[:8].equal(question[0][:8]) for choice in question)
        assert question[1][8:].equal(blocks[(place + 2) % 9]["input_ids"][8:16])
    with pytest.raises(ValueError, match=r"choices must be left out where .* less than 11 tokens, got 12 of 8"):
        load(**prose, max_length=8, retain=str(reviews / "old.txt"), max_evaluation=12, choices=3)


def test_a_variable_in_a_source(load, reviews, monkeypatch):
    monkeypatch.setenv("REVIEWS", str(reviews))
    assert list(load(train="${REVIEWS}/train.tsv").hashes) == ["${REVIEWS}/train.tsv"]
    monkeypatch.delenv("REVIEWS")
    with pytest.raises(ValueError, match="the environment variable REVIEWS is not set"):
        load(train="${REVIEWS}/train.tsv")


class TestErrors:
    @pytest.mark.parametrize(
        ("rows", "changes", "message"),
        [
            ("good\ta\nbad\tb\nit\tc\n" * 8, {"metric": "f1"}, "metric must be accuracy where labels of train are not"),
            ("good\t1\n" * 20, {}, "train .* must have two labels or more, got '1' alone"),
            ("good\t1\n" * 20, {"kind": "regression"}, "train .* must have two labels or more, got '1.0' alone"),
            (
                "".join(f"film {i}\t{i}\n" for i in range(40)) + "good\t1\n" * 39,
                {},
                "label must be a column with classes of train .*, got 'label' with 40 for 79 examples, such as '0'",
            ),
            (
                "good\t1\nbad\t0\n" * 8,
                {},
                "train .* must hold more examples than the 16 that are .*, got 16",
            ),
        ],
    )
    def test_train(self, load, tmp_path, rows, changes, message):
        (tmp_path / "a.tsv").write_text("sentence\tlabel\n" + rows)
        with pytest.raises(ValueError, match=message):
            load(train=str(tmp_path / "a.tsv"), **changes)

    def test_label_not_in_train(self, load, tmp_path):
        (tmp_path / "dev.tsv").write_text("sentence\tlabel\ngood\t7\n")
        message = r"dev\.tsv, line 2, column 'label', must be a label of train, \['0', '1'\], got '7'"
        with pytest.raises(ValueError, match=message):
            load(evaluation=str(tmp_path / "dev.tsv"))

    def test_too_few_blocks(self, load, prose):
        with pytest.raises(ValueError, match="must hold at least 4096 tokens, got"):
            load(**prose, max_length=4096)
        with pytest.raises(
            ValueError,
            match=r"must hold more blocks of 16 tokens than the 600 that are held out for .* = 300, got",
        ):
            load(**{**prose, "validation_examples": 300})


@pytest.fixture
def prompted(prose, reviews):
    """Settings that differ for a classification in words."""
    words = {"kind": "prompted", "prompt": "the film was {sentence} very", "answers": {"0": "bad", "1": "good"}}
    return {**prose, **words, "train": str(reviews / "train.tsv"), "text": ["sentence"], "validation_examples": 8}


def test_prompts_end_with_their_answer(load, prompted):
    data = load(**prompted)
    assert data.labels == ["0", "1"]
    good, bad = 3, 4
    assert data.answers.tokens == (bad, good)
    for example in every(data):
        *ids, answer = example["input_ids"]
        assert example["labels"] == [-100] * len(ids) + [answer]
        assert len(example["attention_mask"]) == len(example["labels"]) <= 16
        # The first word of the sentence is its label too.
        assert ids[3] == answer
    lengths = {len(example["input_ids"]) for example in data.train}
    short = load(**prompted, max_length=4)
    assert [example["input_ids"] for example in short.train] == [example["input_ids"][-4:] for example in data.train]
    assert len(lengths) > 1
    batch = data.collate(data.train[:8])
    assert batch["labels"].shape == batch["input_ids"].shape == batch["attention_mask"].shape
    assert data.answers.classes(batch["labels"].numpy()).tolist() == [
        int(example["labels"][-1] == good) for example in data.train[:8]
    ]
    logits = torch.randn(*batch["labels"].shape, 11)
    expected = [
        row[len(example["labels"]) - 2, [bad, good]] for row, example in zip(logits, data.train[:8], strict=True)
    ]
    assert torch.equal(data.answers.logits(logits, batch["labels"]), torch.stack(expected))


def test_prompts_beside_blocks_of_old_texts(load, prompted, reviews):
    changes = {**prompted, "retain": str(reviews / "old.txt"), "replay": 0.2}
    data = load(**changes, max_retained=2, max_evaluation=4)
    assert (len(data.evaluation), len(data.retain.blocks[changes["retain"]])) == (4, 2)
    replayed = [example for example in data.train if len(example["input_ids"]) == 16 and example["labels"][0] != -100]
    assert len(replayed) == 12
    batch = data.collate([data.train[0], replayed[0]])
    assert (batch["labels"][0] != -100).sum() == 1
    assert torch.equal(batch["labels"][1], batch["input_ids"][1])


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        (
            {"0": "bad", "2": "good"},
            r"^answers must be to the labels of train, \['0', '1'\], got {'0': 'bad', '2': 'good'}$",
        ),
        ({"0": "bad", "1": "very good"}, "^answers must be one token each, got 'very good', which is 2$"),
        ({"0": "worse", "1": "better"}, r"^answers must be different tokens, got .* as \[1, 1\]$"),
    ],
)
def test_errors_name_answers(load, prompted, answers, message):
    with pytest.raises(ValueError, match=message):
        load(**(prompted | {"answers": answers}))
