from functools import partial

import pytest
import torch
from transformers import AutoModel, AutoTokenizer

from torchdsc.lab.adapt.config import AdaptConfig, Method, Task
from torchdsc.lab.adapt.data import load_task
from torchdsc.lab.adapt.methods import build_model
from torchdsc.lab.adapt.sentences import collate_sentences
from torchdsc.lab.adapt.study import adapt

PAIRS = {"kind": "regression", "text": ["sentence1", "sentence2"], "label": "score"}
SINGLE = {"text": ["sentence"]}


@pytest.fixture(params=["pairs", "single"])
def task(request, reviews):
    if request.param == "pairs":
        return Task("t", str(reviews / "scores.tsv"), **PAIRS)
    return Task("t", str(reviews / "train.tsv"), **SINGLE)


@pytest.fixture
def load(encoder):
    tokenizer = AutoTokenizer.from_pretrained(encoder)
    return partial(load_task, tokenizer=tokenizer, max_length=16, validation_examples=8, head="embedding")


def build(encoder, data, method, **options):
    config = AdaptConfig(encoder, [data.task], [method], head="embedding", **options)
    torch.manual_seed(0)
    return build_model(method, config, data)


def test_logits_are_those_of_each_sentence_alone(encoder, task, load):
    data = load(task)
    rows = data.train.rows[:5]
    assert len({length for row in rows for length in row["lengths"]}) > 1
    batch = data.collate(rows)
    model = build(encoder, data, Method("m", "full")).eval()
    found = model(**batch)

    base = AutoModel.from_pretrained(encoder).eval()
    logits = []
    for row in rows:
        embeddings = []
        for ids in torch.tensor(row["input_ids"]).split(row["lengths"]):
            mean = base(ids[None]).last_hidden_state[0].mean(dim=0)
            embeddings.append(mean / mean.norm() * 32**0.5)
        u, v = embeddings[0], embeddings[-1]
        features = u if task.kind == "classification" else torch.cat([u, v, (u - v).abs(), u * v])
        logits.append(model.classifier.weight @ features + model.classifier.bias)
    expected = torch.stack(logits)
    torch.testing.assert_close(found.logits, expected, rtol=1e-4, atol=1e-5)
    labels = batch["labels"]
    loss = (
        (expected[:, 0] - labels).square().mean()
        if task.kind == "regression"
        else -expected.log_softmax(dim=-1)[range(5), labels].mean()
    )
    torch.testing.assert_close(found.loss, loss, rtol=1e-4, atol=1e-5)


def test_padding_does_not_count_in_regularisers(encoder, load, reviews):
    data = load(Task("t", str(reviews / "scores.tsv"), **PAIRS))
    options = {"num_atoms": 8, "target_modules": ["query"], "z_weight": 0.1}
    model = build(encoder, data, Method("m", "dsc", options=options)).train()
    counts = []
    for module in model.modules():
        if hasattr(module, "statistics_log"):
            module.statistics_log.leave = lambda entry, *_, **__: counts.append(int(entry.num_tokens))
    batch = data.collate(data.train.rows[:5])
    model(**batch)
    assert batch["attention_mask"].sum() < batch["attention_mask"].numel()
    assert counts == [int(batch["attention_mask"].sum())] * 2


def test_base_options_reach_the_encoder(encoder, task, load):
    data = load(task)
    changed = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "attn_implementation": "eager"}
    model = build(encoder, data, Method("m", "full"), base_options=changed).train()
    batch = data.collate(data.train.rows[:4])
    assert torch.equal(model(**batch).logits, model(**batch).logits)
    assert model.encoder.config._attn_implementation == "eager"
    dropped = build(encoder, data, Method("m", "full")).train()
    assert not torch.equal(dropped(**batch).logits, dropped(**batch).logits)


def test_every_weight_is_trained(encoder, task, load):
    data = load(task)
    model = build(encoder, data, Method("m", "full"))
    model(**data.collate(data.train.rows[:4])).loss.backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


def test_a_study(study, reviews, tmp_path):
    tasks = [
        {"name": "scores", "train": str(reviews / "scores.tsv"), **PAIRS},
        {"name": "reviews", "train": str(reviews / "train.tsv"), **SINGLE},
    ]
    results = adapt(study(tasks=tasks, head="embedding", steps=30, learning_rates=[3e-2]), tmp_path / "out")
    assert all(run["params_adapter"] <= 512 for run in results["runs"])
    # The first word tells score and label.
    assert all(run["score"] > 90 for run in results["runs"]), results["runs"]
    assert [measured["batch"][:2] for measured in results["timing"].values()] == [[4, 2]] * 2


def test_collate():
    class Tokenizer:
        def pad(self, sentences, return_tensors):
            longest = max(len(sentence["input_ids"]) for sentence in sentences)
            rows = [sentence["input_ids"] for sentence in sentences]
            ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
            return {"input_ids": ids, "attention_mask": (ids > 0).long()}

    batch = collate_sentences(
        Tokenizer(),
        [
            {"input_ids": [1, 2, 3], "lengths": [1, 2], "labels": 0.5},
            {"input_ids": [4, 5, 6, 7], "lengths": [3, 1], "labels": 1.5},
        ],
    )
    assert batch["input_ids"].tolist() == [[[1, 0, 0], [2, 3, 0]], [[4, 5, 6], [7, 0, 0]]]
    assert batch["attention_mask"].equal((batch["input_ids"] > 0).long())
    assert batch["labels"].tolist() == [0.5, 1.5]


class TestErrors:
    def test_head(self, study):
        with pytest.raises(ValueError, match="head must be 'embedding', got 'mean'"):
            study(head="mean")

    def test_causal_task(self, study, reviews):
        tasks = [{"name": "t", "train": str(reviews / "prose.txt"), "kind": "causal_lm"}]
        with pytest.raises(ValueError, match="head must be None for causal_lm tasks, got 'embedding'"):
            study(tasks=tasks, head="embedding")
