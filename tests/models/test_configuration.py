import json

import pytest
import torch
from transformers import AutoConfig

from torchdsc.models import DSCGPTConfig, DSCGPTForCausalLM


def test_defaults_are_the_papers_dsc_model():
    config = DSCGPTConfig()
    assert config.feed_forward_options == {"num_atoms": 1523, "top_k": 4}
    with torch.device("meta"):
        model = DSCGPTForCausalLM(config)
    d, attention_and_norms = 384, 4 * 384**2 + 4 * 384
    embeddings = (50304 + 256) * d
    layer = attention_and_norms + 2 * d * 327 + 3 * d * 1523 + d
    assert model.num_parameters() == embeddings + 6 * layer + 2 * d
    assert round(model.num_parameters() / 1e6, 2) == 35.0


@pytest.mark.parametrize(
    ("kind", "width", "options", "millions"),
    [("dense", 2611, {}, 35.00), ("moe", 545, {"num_experts": 5, "top_k": 2}, 35.53)],
)
def test_the_papers_other_models(kind, width, options, millions):
    config = DSCGPTConfig(feed_forward=kind, intermediate_size=width, feed_forward_options=options)
    with torch.device("meta"):
        assert round(DSCGPTForCausalLM(config).num_parameters() / 1e6, 2) == millions


def test_round_trip_through_json(kind, make_config, tmp_path):
    config = make_config(kind, residual_init="published", tie_word_embeddings=False, use_cache=False)
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert type(loaded) is DSCGPTConfig
    assert {**loaded.to_dict(), "_name_or_path": ""} == {**config.to_dict(), "_name_or_path": ""}


def test_options_stay_those_that_a_model_was_built_with(tmp_path):
    options = {"num_atoms": 8, "top_k": 2}
    sizes = {"vocab_size": 9, "hidden_size": 4, "num_hidden_layers": 1, "num_attention_heads": 1}
    model = DSCGPTForCausalLM(DSCGPTConfig(feed_forward_options=options, intermediate_size=4, **sizes)).eval()
    # A sweep that goes on to the next model.
    options["num_atoms"], options["gate"] = 6, "mean"
    model.config.to_dict()["feed_forward_options"]["gate"] = "mean"
    with pytest.raises(TypeError, match="does not support item assignment"):
        model.config.feed_forward_options["gate"] = "mean"
    model.save_pretrained(tmp_path)
    ids = torch.arange(9).unsqueeze(0)
    loaded = DSCGPTForCausalLM.from_pretrained(tmp_path)
    assert loaded.config.feed_forward_options == {"num_atoms": 8, "top_k": 2}
    assert torch.equal(loaded(ids).logits, model(ids).logits)


@pytest.mark.parametrize("kind", ["moe", "mixture_of_loras"])
def test_models_of_one_expert_are_evaluated_as_they_were_trained(kind, make_model, tmp_path):
    """Saved before their weight was the raw probability, they were trained with a weight of 1."""
    ids = torch.arange(20).unsqueeze(0)
    model = make_model(kind, feed_forward_options={"top_k": 1})
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["feed_forward_options"].pop("normalize_weights") is False
    loaded = DSCGPTForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    loaded.train()(ids, labels=ids).loss.backward()
    (tmp_path / "config.json").write_text(json.dumps(config))
    old = DSCGPTForCausalLM.from_pretrained(tmp_path)
    assert old.config.feed_forward_options["normalize_weights"] is True
    assert not torch.allclose(old(ids).logits, model(ids).logits, atol=1e-2)
    with pytest.raises(ValueError, match="normalize_weights must be False to train with top_k = 1"):
        old.train()(ids)


def test_other_options_are_checked_when_they_are_assigned(make_config):
    config = make_config("dsc")
    options = {**config.feed_forward_options, "gate": "mean"}
    config.feed_forward_options = options
    options["gate"] = "none"
    assert config.feed_forward_options["gate"] == "mean"
    with pytest.raises(ValueError, match=r"feed_forward='dsc': .*colour"):
        config.feed_forward_options = {**options, "colour": 1}
    assert config.feed_forward_options["gate"] == "mean"


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"vocab_size": 0}, "vocab_size must be >= 1, got 0"),
        ({"hidden_size": -4}, "hidden_size must be >= 1, got -4"),
        ({"num_hidden_layers": 0}, "num_hidden_layers must be >= 1, got 0"),
        ({"max_position_embeddings": 0}, "max_position_embeddings must be >= 1, got 0"),
        ({"num_attention_heads": 5}, "num_attention_heads must divide hidden_size = 16, got 5"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1.0"),
        ({"residual_init": "small"}, r"residual_init must be one of .*'none'\), got 'small'"),
        ({"intermediate_size": -1}, "intermediate_size must be >= 0, got -1"),
        ({"initializer_range": -0.1}, "initializer_range must be finite and >= 0, got -0.1"),
        (
            {"feed_forward_options": {"router": "ngram"}},
            "top_k must be a multiple of the 2 orders of n-grams, got 3",
        ),
    ],
)
def test_errors(changes, match, make_config):
    with pytest.raises(ValueError, match=match):
        make_config("dsc", **changes)


@pytest.mark.parametrize(
    ("keyword", "message"),
    [
        ("num_atoms", "^num_atoms must be given in feed_forward_options, got num_atoms = 3 beside it$"),
        ("router_input", "^router_input must be given in feed_forward_options"),
        ("num_experts", "^num_experts must be given in feed_forward_options"),
        ("hiden_size", r"^hiden_size is no argument of DSCGPTConfig: did you mean hidden_size\?$"),
        ("n_layer", r"^n_layer is no argument of DSCGPTConfig: did you mean num_hidden_layers\?$"),
    ],
)
def test_misplaced_keywords_are_refused(keyword, message):
    """They would be kept as attributes without any effect."""
    with pytest.raises(TypeError, match=message):
        DSCGPTConfig(**{keyword: 3})


def test_other_keywords_are_kept(tmp_path):
    DSCGPTConfig(note="mine", device="cpu", num_labels=3, bos_token_id=1, dtype="float32").save_pretrained(tmp_path)
    assert DSCGPTConfig.from_pretrained(tmp_path).note == "mine"
