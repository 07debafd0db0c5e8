"""Folders that do not hold the weights of the model that their config.json asks for."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from torchdsc.lab.training.environment import quiet_transformers
from torchdsc.lab.training.loading import load_model
from torchdsc.models import DSCGPTConfig, DSCGPTForCausalLM

SIZES = {"vocab_size": 64, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32}


@pytest.fixture(autouse=True)
def _quiet():
    with quiet_transformers():
        yield


@pytest.fixture
def saved(tmp_path):
    """A model's folder, as a run leaves it."""
    config = DSCGPTConfig(num_hidden_layers=1, max_position_embeddings=8, **SIZES)
    DSCGPTForCausalLM(config).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def bert(tmp_path):
    """Saves a small BERT of a class: returns its folder."""

    def save(kind):
        kind(BertConfig(num_hidden_layers=2, **SIZES)).save_pretrained(tmp_path / kind.__name__)
        return tmp_path / kind.__name__

    return save


def change_weights(folder, change):
    file = folder / "model.safetensors"
    save_file({name: w.clone() for name, w in change(load_file(file)).items()}, file, metadata={"format": "pt"})


def change_config(folder, **values):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


class TestOfARun:
    def test_whole(self, saved):
        model = load_model(DSCGPTForCausalLM, saved)
        # The head is the embedding, and not in the file.
        assert not [name for name in load_file(saved / "model.safetensors") if "lm_head" in name]
        assert torch.equal(model.lm_head.weight, load_file(saved / "model.safetensors")["model.embed_tokens.weight"])

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda weights: dict(list(weights.items())[:4]), r"they lack .*, .* and \d+ more$"),
            (
                lambda weights: weights | {"model.extra": torch.zeros(3)},
                "they have, beside the model's, model.extra$",
            ),
        ],
    )
    def test_other_weights(self, saved, change, message):
        change_weights(saved, change)
        expected = "the weights in .*/model must be those that its config.json asks for: "
        with pytest.raises(ValueError, match=expected + message):
            load_model(DSCGPTForCausalLM, saved)

    @pytest.mark.parametrize(
        ("values", "message"),
        [
            ({"num_hidden_layers": 2}, r"they lack model.blocks.1\."),
            ({"num_hidden_layers": 0}, "num_hidden_layers|they have, beside the model's, model.blocks.0"),
            ({"vocab_size": 640}, "model could not be loaded: RuntimeError"),
        ],
    )
    def test_config_of_another_model(self, saved, values, message):
        change_config(saved, **values)
        with pytest.raises(ValueError, match=message):
            load_model(DSCGPTForCausalLM, saved)

    @pytest.mark.parametrize("length", [0, 100, 1000])
    def test_cut_off(self, saved, length):
        file = saved / "model.safetensors"
        file.write_bytes(file.read_bytes()[:length])
        with pytest.raises(ValueError, match=r"the weights in .*/model are damaged: "):
            load_model(DSCGPTForCausalLM, saved)

    @pytest.mark.parametrize("text", ["{", "[1]", '{"model_type": 3}', '{"hidden_size": "x"}'])
    def test_damaged_config(self, saved, text):
        (saved / "config.json").write_text(text)
        with pytest.raises((ValueError, OSError), match=r"config|could not be loaded|hidden_size"):
            load_model(DSCGPTForCausalLM, saved)

    def test_no_weights(self, saved):
        (saved / "model.safetensors").unlink()
        with pytest.raises(OSError, match=r"model\.safetensors"):
            load_model(DSCGPTForCausalLM, saved)


@pytest.mark.parametrize("auto", [AutoModel, AutoModelForSequenceClassification])
class TestOfABaseModel:
    """What adapters are put into: its head may be new."""

    @pytest.mark.parametrize("kind", [BertModel, BertForMaskedLM, BertForSequenceClassification])
    def test_head_of_another_task(self, bert, kind, auto):
        assert load_model(auto, bert(kind), has_new_head=True).base_model.config.num_hidden_layers == 2

    @pytest.mark.parametrize("kind", [BertModel, BertForMaskedLM])
    def test_weights_of_another_model(self, bert, kind, auto):
        folder = bert(kind)
        change_config(folder, num_hidden_layers=1)
        with pytest.raises(ValueError, match=r"they have, beside the model's, (bert\.)?encoder.layer.1"):
            load_model(auto, folder, has_new_head=True)
        change_config(folder, num_hidden_layers=2)
        change_weights(folder, lambda weights: {n: w for n, w in weights.items() if "layer.1.attention.self" not in n})
        with pytest.raises(ValueError, match=r"they lack (bert\.)?encoder.layer.1.attention.self.* and 3 more$"):
            load_model(auto, folder, has_new_head=True)


def test_other_sizes_of_the_head_alone(bert):
    folder = bert(BertForSequenceClassification)
    options = {"has_new_head": True, "ignore_mismatched_sizes": True, "num_labels": 5}
    assert load_model(AutoModelForSequenceClassification, folder, **options).num_labels == 5
    change_config(folder, intermediate_size=48)
    with pytest.raises(ValueError, match=r"they have sizes that differ in bert.encoder.layer.0.intermediate"):
        load_model(AutoModelForSequenceClassification, folder, **options)


def test_causal_language_model(tmp_path):
    LlamaForCausalLM(LlamaConfig(num_hidden_layers=2, tie_word_embeddings=True, **SIZES)).save_pretrained(tmp_path)
    assert load_model(AutoModelForCausalLM, tmp_path).config.num_hidden_layers == 2
    change_weights(tmp_path, lambda weights: {n: w for n, w in weights.items() if "norm" not in n})
    with pytest.raises(ValueError, match=r"they lack model\.layers\.0\.input_layernorm\.weight"):
        load_model(AutoModelForCausalLM, tmp_path)
