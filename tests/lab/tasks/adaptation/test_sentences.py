import pytest
import torch
from transformers import AutoModel

from torchdsc.lab.tasks.adaptation.base import load_tokenizer
from torchdsc.lab.tasks.adaptation.examples import load_data
from torchdsc.lab.tasks.adaptation.methods import build_model

FULL = {"method": "full", "options": {}, "head": "embedding"}


@pytest.fixture(params=["pairs", "single"])
def task(request, pairs):
    return pairs if request.param == "pairs" else {}


@pytest.fixture
def make(settings):
    """Makes a model, and a batch of its data with the rows that it is of."""

    def build(**changes):
        chosen = settings(**{**FULL, **changes})
        data = load_data(chosen, load_tokenizer(chosen))
        torch.manual_seed(0)
        rows = data.train[:5]
        return build_model(chosen, chosen.options, data.labels), data.collate(rows), rows

    return build


def test_logits_are_those_of_each_sentence_alone(encoder, task, make):
    model, batch, rows = make(**task)
    assert len({length for row in rows for length in row["lengths"]}) > 1
    found = model.eval()(**batch)
    base = AutoModel.from_pretrained(encoder).eval()
    logits = []
    for row in rows:
        embeddings = []
        for ids in torch.tensor(row["input_ids"]).split(row["lengths"]):
            mean = base(ids[None]).last_hidden_state[0].mean(dim=0)
            embeddings.append(mean / mean.norm() * 32**0.5)
        u, v = embeddings[0], embeddings[-1]
        features = torch.cat([u, v, (u - v).abs(), u * v]) if task else u
        logits.append(model.classifier.weight @ features + model.classifier.bias)
    expected, labels = torch.stack(logits), batch["labels"]
    torch.testing.assert_close(found.logits, expected, rtol=1e-4, atol=1e-5)
    loss = (expected[:, 0] - labels).square() if task else -expected.log_softmax(dim=-1)[range(5), labels]
    torch.testing.assert_close(found.loss, loss.mean(), rtol=1e-4, atol=1e-5)


def test_padding_does_not_count_in_regularisers(make, pairs):
    options = {"num_atoms": 8, "target_modules": ["query"], "z_weight": 0.1}
    model, batch, _ = make(**pairs, method="dsc", options=options)
    counts = []
    for module in model.modules():
        if hasattr(module, "statistics_log"):
            module.statistics_log.leave = lambda entry, *_, **__: counts.append(int(entry.num_tokens))
    model.train()(**batch)
    assert batch["attention_mask"].sum() < batch["attention_mask"].numel()
    assert counts == [int(batch["attention_mask"].sum())] * 2


def test_base_options_reach_the_encoder(make, task):
    changed = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "attn_implementation": "eager"}
    model, batch, _ = make(**task, base_options=changed)
    model.train()
    assert torch.equal(model(**batch).logits, model(**batch).logits)
    assert model.encoder.config._attn_implementation == "eager"
    dropped = make(**task)[0].train()
    assert not torch.equal(dropped(**batch).logits, dropped(**batch).logits)


def test_every_weight_is_trained(make, task):
    model, batch, _ = make(**task)
    model(**batch).loss.backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []
