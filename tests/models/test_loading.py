"""Saved models in processes that start anew, as users and evaluation harnesses load them."""

import json
import subprocess
import sys

import pytest
import torch

from torchdsc.models import DSCGPTConfig, DSCGPTForCausalLM
from torchdsc.models.configuration import DSCGPTConfig as Config

IDS = [[3, 1, 4, 1, 5]]
# Logits by an Auto class, and text by a pipeline, from the folder in argv.
CODE = """
import sys, json
{before}
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, pipeline
import torch

folder, options = sys.argv[1], {options}
config = AutoConfig.from_pretrained(folder, **options)
tokenizer = AutoTokenizer.from_pretrained(folder, **options)
model = AutoModelForCausalLM.from_pretrained(folder, **options)
backbone = AutoModel.from_pretrained(folder, **options)
generate = pipeline("text-generation", model=folder, **options)
with torch.no_grad():
    logits = model(torch.tensor({ids})).logits
text = generate("a b", max_new_tokens=4, do_sample=False)[0]["generated_text"]
if len(sys.argv) > 2:
    model.save_pretrained(sys.argv[2])
    tokenizer.save_pretrained(sys.argv[2])
print(json.dumps([type(x).__module__ for x in (config, model, backbone)] + [logits.tolist(), text]))
"""


@pytest.fixture
def registered():
    """Undo the registration, which is of the class."""
    yield DSCGPTForCausalLM.register_for_auto_class
    Config._saves_module = False


@pytest.fixture
def folder(make_model, tmp_path):
    """Saves a tiny model and its tokenizer."""
    tokenizers = pytest.importorskip("tokenizers")
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate(["<pad>", "a", "b", *map(str, range(58))])}
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<pad>"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()

    def save():
        model = make_model("dsc, embeddings")
        model.save_pretrained(tmp_path / "model")
        PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>").save_pretrained(tmp_path / "model")
        return tmp_path / "model", model

    return save


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Runs the code above in a new process, whose own cache has no module in it."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    def call(*folders, before="", **options):
        code = CODE.format(before=before, options=options, ids=IDS)
        return subprocess.run(
            [sys.executable, "-c", code, *map(str, folders)], capture_output=True, text=True, timeout=250
        )

    return call


def check(done, model):
    assert done.returncode == 0, done.stderr[-3000:]
    *modules, logits, text = json.loads(done.stdout.splitlines()[-1])
    assert modules == ["torchdsc.models.configuration", "torchdsc.models.modeling", "torchdsc.models.modeling"]
    torch.testing.assert_close(torch.tensor(logits), model(torch.tensor(IDS)).logits.detach())
    assert text.startswith("a b")


def test_after_an_import(folder, run):
    path, model = folder()
    check(run(path, before="import torchdsc.models"), model)
    assert {file.suffix for file in path.iterdir()} == {".json", ".safetensors"}


def test_without_one_by_a_file_beside_the_weights(folder, run, registered, tmp_path):
    registered()
    path, model = folder()
    assert [file.name for file in path.glob("*.py")] == ["modeling_dsc_gpt.py"]
    # Saved again by a program that knows nothing of it, it loads as before.
    check(run(path, tmp_path / "again", trust_remote_code=True), model)
    assert [file.name for file in (tmp_path / "again").glob("*.py")] == ["modeling_dsc_gpt.py"]
    check(run(tmp_path / "again", trust_remote_code=True), model)
    # Nothing is run where torchdsc.models is there already.
    check(run(path, before="import torchdsc.models"), model)


def test_not_without_either(folder, run):
    assert "does not recognize this architecture" in run(folder()[0]).stderr


def test_the_file_goes_with_a_configuration_that_had_one(registered, tmp_path):
    registered()
    DSCGPTConfig().save_pretrained(tmp_path / "first")
    Config._saves_module = False
    DSCGPTConfig.from_pretrained(tmp_path / "first").save_pretrained(tmp_path / "second")
    assert (tmp_path / "second" / "modeling_dsc_gpt.py").is_file()
    DSCGPTConfig().save_pretrained(tmp_path / "third")
    assert [file.name for file in (tmp_path / "third").iterdir()] == ["config.json"]
