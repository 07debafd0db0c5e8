"""Converted models, saved and loaded, and under Trainer."""

import copy
import json
import pickle
import subprocess
import sys

import pytest
import torch
import transformers
from torch import nn
from torch.nn import functional

from torchdsc import convert, last_regularization, load_converted
from torchdsc.nn import RoutedLayer

SIZES = {
    "vocab_size": 61,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GPT2 = {"n_embd": 16, "n_layer": 2, "n_head": 2, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
# A model, and arguments of convert that it needs.
CASES = {
    "llama": (lambda: llama(), {}),
    "llama, one bank": (lambda: llama(), {"share_bank": True}),
    "llama, replaced": (lambda: llama(), {"mode": "replace"}),
    "gpt2": (
        lambda: transformers.GPT2LMHeadModel(
            transformers.GPT2Config(vocab_size=61, bos_token_id=1, eos_token_id=2, pad_token_id=0, **GPT2)
        ),
        {},
    ),
    "neox": (lambda: transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(**SIZES)), {"share_bank": True}),
    "mixtral": (
        lambda: transformers.MixtralForCausalLM(
            transformers.MixtralConfig(num_local_experts=2, num_key_value_heads=2, **SIZES)
        ),
        {"in_features": 16, "out_features": 16},
    ),
}


def llama():
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(num_key_value_heads=2, **SIZES))


def converted(make=llama, **arguments):
    model = make().eval()
    convert(model, num_atoms=20, top_k=3, gamma_init=1.0, **arguments)
    return model


@pytest.fixture
def input_ids():
    return torch.randint(3, 61, (4, 9))


class TestRoundTrip:
    @pytest.mark.parametrize("case", CASES)
    def test_gives_the_same_logits(self, case, input_ids, tmp_path):
        make, arguments = CASES[case]
        model = converted(make, **arguments)
        model.save_pretrained(tmp_path / "first")
        loaded = load_converted(tmp_path / "first")
        assert torch.equal(loaded(input_ids).logits, model(input_ids).logits)
        assert not loaded.training
        # Again, as a loaded model is a converted one.
        loaded.save_pretrained(tmp_path / "second")
        again = load_converted(tmp_path / "second", dtype=torch.float64)
        assert {parameter.dtype for parameter in again.parameters()} == {torch.float64}
        assert torch.equal(again.float()(input_ids).logits, model(input_ids).logits)

    def test_of_two_conversions_and_a_predicate(self, input_ids, tmp_path):
        model = converted(target=lambda name, module: name.endswith("1.mlp"))
        convert(model, target=r"q_proj$", num_atoms=10, top_k=2, gamma_init=1.0, mode="wrap")
        model.save_pretrained(tmp_path)
        loaded = load_converted(tmp_path)
        assert torch.equal(loaded(input_ids).logits, model(input_ids).logits)
        assert sum(isinstance(module, RoutedLayer) for module in loaded.modules()) == 3

    def test_in_a_fresh_process(self, input_ids, tmp_path):
        model = converted(share_bank=True)
        model.save_pretrained(tmp_path / "model")
        torch.save(input_ids, tmp_path / "ids.pt")
        code = (
            "import sys, torch, torchdsc; folder = sys.argv[1];"
            "model = torchdsc.load_converted(folder + '/model');"
            "torch.save(model(torch.load(folder + '/ids.pt')).logits, folder + '/logits.pt')"
        )
        subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)
        torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), model(input_ids).logits)

    @pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])  # noqa: S301
    def test_of_a_copy(self, duplicate, input_ids, tmp_path):
        model = converted()
        duplicate(model).save_pretrained(tmp_path)
        assert torch.equal(load_converted(tmp_path)(input_ids).logits, model(input_ids).logits)

    def test_of_another_class(self, input_ids, tmp_path):
        model = converted(lambda: transformers.LlamaModel(transformers.LlamaConfig(**SIZES)))
        model.save_pretrained(tmp_path)
        loaded = load_converted(tmp_path)
        assert torch.equal(loaded(input_ids).last_hidden_state, model(input_ids).last_hidden_state)
        assert isinstance(loaded, transformers.LlamaModel)

    def test_two_models_of_one_config(self, tmp_path):
        config = llama().config
        models = [transformers.LlamaForCausalLM(config).eval() for _ in range(3)]
        for model in models[:2]:
            convert(model, num_atoms=20, top_k=3, gamma_init=1.0)
        input_ids = torch.randint(61, (2, 9))
        for index, model in enumerate(models[:2]):
            assert model.config is model.model.config
            model.save_pretrained(tmp_path / str(index))
            assert torch.equal(load_converted(tmp_path / str(index))(input_ids).logits, model(input_ids).logits)
        models[2].save_pretrained(tmp_path / "plain")
        assert "torchdsc" not in (tmp_path / "plain" / "config.json").read_text()

    def test_modules_that_are_not_there(self, tmp_path):
        converted().save_pretrained(tmp_path)
        config = json.loads((tmp_path / "config.json").read_text())
        config["torchdsc_conversions"][0]["modules"] = ["layers.0.mlp"]
        (tmp_path / "config.json").write_text(json.dumps(config))
        with pytest.raises(ValueError, match=r"name modules of LlamaForCausalLM, got \['layers.0.mlp'\]: convert the"):
            load_converted(tmp_path)

    def test_of_the_hub_by_name(self, tmp_path):
        model = converted()
        # The layout of the hub's cache.
        cached = tmp_path / "models--someone--converted"
        model.save_pretrained(cached / "snapshots" / "1234")
        (cached / "refs").mkdir()
        (cached / "refs" / "main").write_text("1234")
        where = {"cache_dir": tmp_path, "local_files_only": True}
        loaded = load_converted("someone/converted", **where)
        input_ids = torch.randint(61, (2, 9))
        assert torch.equal(loaded(input_ids).logits, model(input_ids).logits)
        with pytest.raises(OSError, match="someone/else"):
            load_converted("someone/else", **where)


class TestWhatWouldBeSilent:
    @pytest.mark.parametrize("cls", [transformers.AutoModelForCausalLM, transformers.LlamaForCausalLM])
    def test_transformers_refuses_a_converted_model(self, cls, tmp_path):
        """It would start its feed-forward modules anew."""
        converted().save_pretrained(tmp_path)
        with pytest.raises(OSError, match=r"to-be-loaded-by-torchdsc.load_converted"):
            cls.from_pretrained(tmp_path)

    def test_a_model_that_is_not_converted(self, tmp_path):
        llama().save_pretrained(tmp_path)
        with pytest.raises(ValueError, match=r"folder must hold a model that torchdsc.convert has converted, got '"):
            load_converted(tmp_path)
        with pytest.raises(FileNotFoundError):
            load_converted(tmp_path / "nothing")

    def test_weights_that_are_missing(self, tmp_path):
        from safetensors.torch import load_file, save_file

        converted().save_pretrained(tmp_path)
        weights = load_file(tmp_path / "model.safetensors")
        del weights["model.layers.1.mlp.module.dsc.gamma"]
        save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ValueError, match=r"must be those of its config, got .*layers.1.mlp.module.dsc.gamma"):
            load_converted(tmp_path)

    @pytest.mark.parametrize(
        ("changes", "match"),
        [
            ({"torchdsc_conversions": ["mlp"]}, "must be what torchdsc.convert has written, got .'mlp'.$"),
            ({"torchdsc_conversions": [{"modules": []}]}, "must be what torchdsc.convert has written"),
            ({"architectures": ["pipeline"]}, "model_class must be given .* got 'pipeline'"),
            ({"architectures": None}, "model_class must be given .* got 'none'"),
        ],
    )
    def test_a_changed_config(self, changes, match, tmp_path):
        converted().save_pretrained(tmp_path)
        settings = json.loads((tmp_path / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps(settings | changes))
        with pytest.raises(ValueError, match=match):
            load_converted(tmp_path)

    def test_pickled_weights(self, tmp_path, monkeypatch):
        model = converted()
        model.save_pretrained(tmp_path)
        (tmp_path / "model.safetensors").unlink()
        torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
        monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("a pickle was read"))
        with pytest.raises(OSError, match=r"model\.safetensors"):
            load_converted(tmp_path)

    def test_a_class_that_transformers_does_not_have(self, input_ids, tmp_path):
        class OwnLlama(transformers.LlamaForCausalLM):
            pass

        model = converted(lambda: OwnLlama(transformers.LlamaConfig(**SIZES)))
        model.save_pretrained(tmp_path)
        with pytest.raises(ValueError, match=r"model_class must be given .* got 'OwnLlama'"):
            load_converted(tmp_path)
        loaded = load_converted(tmp_path, model_class=OwnLlama)
        assert torch.equal(loaded(input_ids).logits, model(input_ids).logits)

    def test_pushing_a_half_written_config(self, tmp_path):
        with pytest.raises(ValueError, match="push_to_hub must be False"):
            converted().save_pretrained(tmp_path, push_to_hub=True)

    def test_config_json_says_what_was_converted(self, tmp_path):
        converted().save_pretrained(tmp_path)
        (conversion,) = json.loads((tmp_path / "config.json").read_text())["torchdsc_conversions"]
        assert conversion["modules"] == ["model.layers.0.mlp", "model.layers.1.mlp"]
        assert conversion["arguments"]["num_atoms"] == 20


# Linear in tokens, or independent of them: exact however a step is cut up.
LINEAR = {"aux_weight": 0.0, "budget_weight": 0.0, "z_weight": 0.1, "frame_weight": 0.05}


def precise_loss(logits, labels, vocab_size=None, num_items_in_batch=None, **_):
    """transformers' loss is float32 whatever the model is."""
    total = functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")
    return total / ((labels[:, 1:] != -100).sum() if num_items_in_batch is None else num_items_in_batch)


class TestTrainer:
    @pytest.fixture
    def train(self, input_ids, tmp_path):
        pytest.importorskip("accelerate")

        def train(model, accumulation=1, **options):
            settings = {
                "per_device_train_batch_size": 4 // accumulation,
                "gradient_accumulation_steps": accumulation,
                "max_steps": 1,
                "optim": "sgd",
                "learning_rate": 0.1,
                "max_grad_norm": 0.0,
                "save_strategy": "no",
            }
            arguments = transformers.TrainingArguments(
                output_dir=str(tmp_path / "trainer"),
                use_cpu=True,
                report_to=[],
                disable_tqdm=True,
                **settings | options,
            )
            labels = input_ids.clone()
            labels[0, :5] = -100
            examples = [{"input_ids": x, "labels": y} for x, y in zip(input_ids, labels, strict=True)]
            trainer = transformers.Trainer(model, arguments, train_dataset=examples)
            trainer.train()
            return trainer

        return train

    def test_regularises_whatever_the_accumulation(self, train):
        results = []
        for accumulation, weights in ((1, LINEAR), (2, LINEAR), (4, LINEAR), (1, dict.fromkeys(LINEAR, 0.0))):
            torch.manual_seed(0)
            model = llama().double()
            convert(model, num_atoms=20, top_k=3, **weights)
            model.loss_function = precise_loss
            train(model, accumulation)
            results.append({name: value.detach() for name, value in model.named_parameters()})
        for result in results[1:3]:
            torch.testing.assert_close(result, results[0], rtol=1e-10, atol=1e-13)
        router = "model.layers.0.mlp.module.dsc.router.weight"
        assert not torch.allclose(results[3][router], results[0][router], rtol=1e-6)

    def test_resumes_and_its_checkpoints_load(self, train, input_ids, tmp_path):
        options = {"optim": "adamw_torch", "save_strategy": "steps", "save_steps": 2, "learning_rate": 1e-3}
        torch.manual_seed(0)
        start = converted(share_bank=True)
        whole, again = copy.deepcopy(start), copy.deepcopy(start)
        train(whole, max_steps=4, **options)
        folder = tmp_path / "trainer" / "checkpoint-2"
        train(again, max_steps=2, **options)
        loaded = load_converted(folder)
        assert torch.equal(loaded(input_ids).logits, again.eval()(input_ids).logits)
        assert not torch.equal(loaded(input_ids).logits, start(input_ids).logits)

    def test_terms_for_a_log(self, input_ids):
        model = converted().train()
        model(input_ids, labels=input_ids)
        assert last_regularization(model)["aux"] > 0


class Gated(nn.Module):
    """A feed-forward module that is told more than its input, by names that routed layers use too."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x, router_input=None, token_mask=None):
        return self.down(self.up(x) * router_input.sigmoid() * token_mask.unsqueeze(-1))


class Routing(nn.Module):
    def __init__(self):
        super().__init__()
        self.mlp = Gated()

    def forward(self, x):
        return self.mlp(x, router_input=x.flip(-1), token_mask=x.sum(-1) > 0)


def test_the_base_has_all_arguments_that_it_had():
    model, x = Routing(), torch.randn(3, 5, 16)
    expected = model(x)
    convert(model, num_atoms=20, top_k=3, gamma_init=0.0)
    assert torch.equal(model(x), expected)
