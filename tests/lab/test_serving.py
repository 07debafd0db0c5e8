"""Saved models behind the endpoint stream what they generate."""

import json
import socket
import subprocess
import sys
import time
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

import pytest
import torch
from peft import get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedTokenizerFast

import torchdsc
from torchdsc.adapters import DSCAdapterConfig
from torchdsc.lab.inspection import load_saved
from torchdsc.lab.serving import serve
from torchdsc.models import DSCGPTConfig, DSCGPTForCausalLM

POSITIONS = 32
SIZES = {"vocab_size": 5, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
SIZES |= {"max_position_embeddings": POSITIONS}


def dscgpt(base=None):
    layer = torchdsc.recommended("ngrams", num_atoms=60)
    return DSCGPTForCausalLM(
        DSCGPTConfig(**SIZES, intermediate_size=16, initializer_range=0.5, feed_forward_options=layer)
    )


def converted(base):
    model = LlamaForCausalLM(LlamaConfig(**SIZES, intermediate_size=48, initializer_range=0.5))
    torchdsc.convert(model, num_atoms=40, top_k=4, gamma_init=1.0)
    return model


def adapted(base):
    LlamaForCausalLM(LlamaConfig(**SIZES, intermediate_size=48, initializer_range=0.5)).save_pretrained(base)
    model = LlamaForCausalLM.from_pretrained(base)
    config = DSCAdapterConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], num_atoms=24, top_k=2, gamma_init=1.0)
    return get_peft_model(model, config)


@pytest.fixture
def folder(tmp_path):
    words = Tokenizer(models.WordLevel({letter: place for place, letter in enumerate("abcd ")}, "a"))
    words.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(tmp_path / "served")
    return tmp_path / "served"


@pytest.mark.slow
@pytest.mark.parametrize("build", [dscgpt, converted, adapted], ids=lambda build: build.__name__)
def test_a_completion_is_streamed(folder, build, tmp_path):
    torch.manual_seed(0)
    build(tmp_path / "base").save_pretrained(folder)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "torchdsc", "serve", str(folder), "--device", "cpu", "--port", str(port)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as server:
        try:
            wait_for(f"http://localhost:{port}/health", server)
            wanted = {"model": folder.name, "prompt": "abc", "stream": True, "max_tokens": 8, "temperature": 0}
            headers = {"content-type": "application/json"}
            request = Request(f"http://localhost:{port}/v1/completions", json.dumps(wanted).encode(), headers)
            with urlopen(f"http://localhost:{port}/v1/models", timeout=60) as answer:
                assert [each["id"] for each in json.load(answer)["data"]] == [folder.name]
            with urlopen(request, timeout=60) as answer:
                events = [json.loads(line[6:]) for line in answer if line.startswith(b"data: {")]
            # As many tokens as there are positions, if the request does not say how many; an error says why.
            short = Request(request.full_url, json.dumps({"model": folder.name, "prompt": "abc"}).encode(), headers)
            with urlopen(short, timeout=60) as answer:
                assert json.load(answer)["usage"]["total_tokens"] <= POSITIONS
            long = Request(request.full_url, json.dumps({"model": folder.name, "prompt": "ab" * 40}).encode(), headers)
            with pytest.raises(HTTPError, match="400") as refused:
                urlopen(long, timeout=60)
            assert f"the model's {POSITIONS} positions" in refused.value.read().decode()
        finally:
            server.terminate()
    parts = [event["choices"][0]["text"] for event in events]
    saved = load_saved(folder)
    ids = saved.tokenizer("abc", return_tensors="pt")["input_ids"]
    expected = saved.model.generate(ids, max_new_tokens=8, do_sample=False)[0, ids.shape[1] :]
    assert len(parts) > 2, "in parts"
    assert "".join(parts).replace(" ", "") == saved.tokenizer.decode(expected).replace(" ", "")


def wait_for(url, server):
    for _ in range(240):
        try:
            with urlopen(url, timeout=5):
                return
        except URLError:
            assert server.poll() is None, server.stdout.read()
            time.sleep(0.25)
    raise TimeoutError(url)


def test_a_model_without_a_tokenizer_is_refused(tmp_path):
    dscgpt().save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="folder must hold a tokenizer beside its model, and there is none in"):
        serve(tmp_path / "model")


def test_a_model_that_does_not_generate_is_refused(folder, tmp_path):
    base = LlamaForSequenceClassification(LlamaConfig(**SIZES, intermediate_size=48))
    base.save_pretrained(tmp_path / "base")
    model = LlamaForSequenceClassification.from_pretrained(tmp_path / "base")
    config = DSCAdapterConfig(task_type="SEQ_CLS", target_modules=["q_proj"], num_atoms=24, top_k=2)
    get_peft_model(model, config).save_pretrained(folder)
    with pytest.raises(ValueError, match="must generate text, and is a PeftModelForSequenceClassification"):
        serve(folder)


def test_bad_port(folder):
    with pytest.raises(ValueError, match="port must be 1 to 65535, got 70000"):
        serve(folder, port=70000)


@pytest.mark.parametrize("device", ["nosuch", "cuda:7"])
def test_a_device_that_is_not_there(folder, device):
    dscgpt().save_pretrained(folder)
    with pytest.raises(ValueError, match=f"device must be one that this machine has, got '{device}'"):
        serve(folder, device=device)
