"""Text from a saved model."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from torchdsc.lab.data.tokenizers import load_tokenizer
from torchdsc.lab.training.generation import generate
from torchdsc.models import DSCGPTConfig, DSCGPTForCausalLM


@pytest.fixture(scope="module")
def experiment(tmp_path_factory):
    """An experiment's folder with one run and a tokenizer."""
    folder = tmp_path_factory.mktemp("experiment")
    config = DSCGPTConfig(
        vocab_size=257, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=16
    )
    DSCGPTForCausalLM(config).save_pretrained(folder / "dsc-seed1" / "model")
    load_tokenizer("bytes", None).save_pretrained(folder / "tokenizer")
    return folder


@pytest.fixture
def run_folder(experiment):
    return experiment / "dsc-seed1"


def test_depends_on_the_seed_alone(run_folder):
    texts = [generate(run_folder, "abc", max_new_tokens=10, seed=seed) for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]
    assert all(text.startswith("abc") for text in texts)


def test_at_temperature_0_the_seed_does_not_matter(run_folder):
    texts = {generate(run_folder, "abc", max_new_tokens=10, temperature=0, seed=seed) for seed in range(3)}
    assert len(texts) == 1


def test_leaves_no_traces(run_folder, capfd):
    before = torch.random.get_rng_state()
    generate(run_folder, "abc", max_new_tokens=3)
    generate(run_folder, "abc", max_new_tokens=3, temperature=0)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert capfd.readouterr() == ("", "")


def test_prompt_may_be_empty_and_the_models_folder_given(run_folder):
    assert generate(run_folder, "", max_new_tokens=3) == generate(run_folder / "model", "", max_new_tokens=3)


def test_prompt_and_new_tokens_must_fit(run_folder):
    assert generate(run_folder, "a" * 10, max_new_tokens=6)
    with pytest.raises(ValueError, match="must fit the model's 16 positions, got 10 tokens and 7"):
        generate(run_folder, "a" * 10, max_new_tokens=7)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be >= 1, got 0"),
        ({"temperature": -0.1}, "temperature must be >= 0, got -0.1"),
        ({"temperature": float("nan")}, "temperature must be >= 0, got nan"),
        ({"top_p": 0.0}, r"top_p must be in \(0, 1\], got 0.0"),
        ({"top_p": 1.5}, r"top_p must be in \(0, 1\], got 1.5"),
    ],
)
def test_arguments(run_folder, arguments, message):
    with pytest.raises(ValueError, match=message):
        generate(run_folder, "abc", **arguments)


def test_weights_that_are_missing(experiment, tmp_path):
    folder = shutil.copytree(experiment, tmp_path / "experiment") / "dsc-seed1"
    file = folder / "model" / "model.safetensors"
    weights = load_file(file)
    save_file({name: weights[name] for name in list(weights)[:4]}, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"the weights in .*/dsc-seed1/model must be those .*: they lack "):
        generate(folder, "abc", max_new_tokens=3)


@pytest.mark.parametrize(
    ("folder", "message"),
    [(".", "a folder of a model has config.json"), ("experiment", "choose one of its runs: dsc-seed1")],
)
def test_no_model(experiment, tmp_path, folder, message):
    shutil.copytree(experiment, tmp_path / "experiment")
    with pytest.raises(FileNotFoundError, match=f"no model in .*: {message}"):
        generate(tmp_path / folder, "abc")


def test_no_tokenizer(run_folder, tmp_path):
    shutil.copytree(run_folder, tmp_path / "run")
    with pytest.raises(FileNotFoundError, match=r"no tokenizer in .*, nor a folder tokenizer beside or above it"):
        generate(tmp_path / "run", "abc")
