"""Files of adapters: every way to load them, and what is refused."""

import copy
import json
import pickle
import warnings

import pytest
import torch
from peft import (
    AutoPeftModel,
    AutoPeftModelForCausalLM,
    PeftConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from safetensors.torch import load_file, save_file

TARGETS = {"llama": ["q_proj", "v_proj", "mlp"], "gpt2": ["c_attn", "mlp"], "bert": ["query"], "t5": ["q"]}
BOTH = {"share_bank": True, "share_router": True}


@pytest.fixture
def saved(adapt, tmp_path):
    """A model whose adapter is saved, and the folder."""

    def make(kind="llama", **fields):
        model = adapt(kind, **{"target_modules": TARGETS.get(kind), "moved": True, **fields})
        model.save_pretrained(tmp_path / "adapter")
        return model, tmp_path / "adapter"

    return make


def banks(model):
    return {id(module.bank): module.bank for module in model.modules() if hasattr(module, "bank")}


class TestLoading:
    @pytest.mark.parametrize("kind", ["llama", "gpt2", "bert", "t5"])
    @pytest.mark.parametrize("options", [{}, BOTH, {"method": "molora"}], ids=["private", "shared", "molora"])
    @pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
    def test_by_transformers(self, kind, options, low_cpu_mem_usage, saved, make_base, make_batch, output):
        if kind == "t5":
            options = {**options, "modules_to_save": ["lm_head"]}
        model, folder = saved(kind, **options)
        loaded, batch = make_base(kind), make_batch(kind)
        info = loaded.load_adapter(folder, low_cpu_mem_usage=low_cpu_mem_usage)
        assert not info.missing_keys
        assert not info.unexpected_keys
        assert torch.equal(output(loaded, batch), output(model, batch))
        loaded.disable_adapters()
        assert torch.equal(output(loaded, batch), output(make_base(kind), batch))
        loaded.enable_adapters()
        assert torch.equal(output(loaded, batch), output(model, batch))

    def test_saved_by_transformers(self, make_base, make_config, make_batch, moved, output, tmp_path):
        model, batch = make_base("llama"), make_batch("llama")
        model.add_adapter(make_config(target_modules=TARGETS["llama"], **BOTH))
        expected = output(moved(model), batch)
        model.save_pretrained(tmp_path)
        assert torch.equal(output(PeftModel.from_pretrained(make_base("llama"), tmp_path), batch), expected)
        other = make_base("llama")
        other.add_adapter(make_config(num_atoms=5, target_modules=["k_proj"]), "other")
        other.load_adapter(tmp_path, "second")
        other.set_adapter("second")
        assert torch.equal(output(other, batch), expected)
        other.set_adapter("other")
        assert torch.equal(output(other, batch), output(make_base("llama"), batch))

    @pytest.mark.parametrize(("auto", "task"), [(AutoPeftModel, None), (AutoPeftModelForCausalLM, "CAUSAL_LM")])
    def test_with_its_base(self, auto, task, make_base, make_config, make_batch, moved, output, tmp_path):
        from transformers import AutoModelForCausalLM

        make_base("llama").save_pretrained(tmp_path / "base")
        base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        model = moved(get_peft_model(base, make_config(target_modules=TARGETS["llama"], task_type=task))).eval()
        model.save_pretrained(tmp_path / "adapter")
        batch = make_batch("llama")
        for loaded in (
            auto.from_pretrained(tmp_path / "adapter"),
            AutoModelForCausalLM.from_pretrained(tmp_path / "adapter"),
        ):
            assert torch.equal(output(loaded, batch), output(model, batch))

    def test_under_another_name_beside_others(self, saved, make_config, make_base, make_batch, output):
        model, folder = saved(**BOTH)
        other, batch = PeftModel.from_pretrained(make_base("llama"), folder, adapter_name="first"), make_batch("llama")
        other.add_adapter("second", make_config(num_atoms=4, target_modules=["q_proj"]))
        other.load_adapter(folder, "third")
        for name, expected in (("first", model), ("second", make_base("llama")), ("third", model)):
            other.set_adapter(name)
            assert torch.equal(output(other, batch), output(expected, batch))

    def test_to_train_on(self, saved, make_base):
        model, folder = saved()
        loaded = PeftModel.from_pretrained(make_base("llama"), folder, is_trainable=True)
        names = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        assert names == {name for name, parameter in loaded.named_parameters() if parameter.requires_grad}

    def test_config_as_it_was(self, saved):
        model, folder = saved(num_atoms=16, router="product_key", router_heads=2, scale=7.0, gamma_init=0.5)
        loaded, config = PeftConfig.from_pretrained(folder), model.peft_config["default"]
        written = {"inference_mode": True, "auto_mapping": loaded.auto_mapping}
        assert loaded.to_dict() == {**config.to_dict(), **written}
        assert loaded.options() == config.options()


class TestSharedBank:
    @pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
    def test_is_written_once_and_stays_one(self, low_cpu_mem_usage, saved, make_base, make_batch, output):
        _, folder = saved(**BOTH)
        keys = [key for key in load_file(folder / "adapter_model.safetensors") if key.endswith("bank.u")]
        # One for each shape: q_proj and the MLP, and v_proj.
        assert len(keys) == 2
        assert sum("router" in key for key in load_file(folder / "adapter_model.safetensors")) == 2
        with warnings.catch_warnings():
            # Such as of missing keys.
            warnings.simplefilter("error", UserWarning)
            model = PeftModel.from_pretrained(make_base("llama"), folder, low_cpu_mem_usage=low_cpu_mem_usage)
        batch, expected = make_batch("llama"), output(model, make_batch("llama"))
        copies = (
            copy.deepcopy(model),
            pickle.loads(pickle.dumps(model)),  # noqa: S301 (its own)
            copy.deepcopy(model).double().float(),
            copy.deepcopy(model).to("cpu", torch.float32),
        )
        for copied in copies:
            assert len(banks(copied)) == 2
            assert not set(banks(copied)) & set(banks(model))
            assert torch.equal(output(copied, batch), expected)
            registered = {id(parameter) for parameter in copied.parameters()}
            assert {id(bank.u) for bank in banks(copied).values()} <= registered

    def test_trains_in_every_layer(self, adapt, make_batch):
        model = adapt("llama", target_modules=["q_proj"], moved=True, **BOTH).train()
        model(**make_batch("llama")).loss.backward()
        (bank,) = banks(model).values()
        both = bank.u.grad.clone()
        model.zero_grad()
        second = model.base_model.model.model.layers[1].self_attn.q_proj
        second._disable_adapters = True
        model(**make_batch("llama")).loss.backward()
        assert not torch.allclose(bank.u.grad, both)


def tampered(folder, **changes):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


LOADERS = {
    "peft": PeftModel.from_pretrained,
    "peft, without memory": lambda base, folder: PeftModel.from_pretrained(base, folder, low_cpu_mem_usage=True),
    "transformers": lambda base, folder: base.load_adapter(folder),
}


def base_of(model):
    """Weights of a base model, whose adapters may be half loaded."""
    for name, value in model.state_dict().items():
        if not any(part in name for part in (".dsc_layers.", ".modules_to_save.")):
            yield name, value


class TestRefusals:
    @pytest.mark.parametrize("how", ["peft", "config", "again", "auto", "transformers", "transformers, asked for"])
    def test_pickled_weights(self, how, saved, make_base, tmp_path, monkeypatch):
        _, folder = saved()
        config = PeftConfig.from_pretrained(folder)
        weights = load_file(folder / "adapter_model.safetensors")
        (folder / "adapter_model.safetensors").unlink()
        torch.save(weights, folder / "adapter_model.bin")
        make_base("llama").save_pretrained(tmp_path / "base")
        tampered(folder, base_model_name_or_path=str(tmp_path / "base"))
        model = make_base("llama")
        load = {
            "config": lambda: PeftModel.from_pretrained(make_base("llama"), folder, config=config),
            "again": lambda: get_peft_model(make_base("llama"), config).load_adapter(folder, "default"),
            "transformers, asked for": lambda: model.load_adapter(folder, use_safetensors=False),
            "peft": lambda: PeftModel.from_pretrained(make_base("llama"), folder),
            "auto": lambda: AutoPeftModelForCausalLM.from_pretrained(folder),
            "transformers": lambda: make_base("llama").load_adapter(folder),
        }[how]
        monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("read"))
        with pytest.raises(ValueError, match=r"must hold adapter_model.safetensors, got only adapter_model.bin"):
            load()

    @pytest.mark.parametrize("change", ["missing", "unexpected"])
    @pytest.mark.parametrize("how", LOADERS)
    def test_other_keys(self, change, how, saved, make_base):
        _, folder = saved()
        weights = load_file(folder / "adapter_model.safetensors")
        key = next(key for key in weights if key.endswith("gamma"))
        value = weights.pop(key)
        if change == "unexpected":
            weights = {**weights, key: value, key + "s": value.clone()}
        save_file(weights, folder / "adapter_model.safetensors")
        with pytest.raises(ValueError, match=rf"adapter's weights must be .*1 \(.*gamma.*\) {change}"):
            LOADERS[how](make_base("llama"), folder)

    @pytest.mark.parametrize("how", LOADERS)
    @pytest.mark.parametrize(
        "key",
        [
            "base_model.model.model.layers.0.self_attn.q_proj.base_layer.weight",
            "base_model.model.lm_head.original_module.weight",
            "base_model.model.lm_head.modules_to_save.other.weight",
            "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight",
            "note",
        ],
    )
    def test_weights_of_others(self, key, how, saved, make_base, make_batch, output):
        _, folder = saved(modules_to_save=["lm_head"])
        weights = load_file(folder / "adapter_model.safetensors")
        save_file({**weights, key: torch.zeros(64, 32)}, folder / "adapter_model.safetensors")
        base, state = make_base("llama"), make_base("llama").state_dict()
        is_own_copy = "modules_to_save" in key or "original_module" in key
        if is_own_copy and how != "transformers":
            # PEFT writes them where the vocabulary was resized: the head itself is there too.
            LOADERS[how](base, folder)
        else:
            with pytest.raises(ValueError, match=r"adapter's weights must be .*1 .* unexpected"):
                LOADERS[how](base, folder)
        kept = {name.replace("base_layer.", "").replace("original_module.", ""): value for name, value in base_of(base)}
        assert all(torch.equal(kept[name], value) for name, value in state.items())

    def test_given_state_dicts_too(self, saved, make_base):
        model, _ = saved()
        weights, config = get_peft_model_state_dict(model), model.peft_config["default"]
        weights["base_model.model.model.norm.weight"] = torch.zeros(32)
        base = make_base("llama")
        with pytest.raises(ValueError, match=r"1 \(base_model.model.model.norm.weight\) unexpected"):
            base.load_adapter(peft_config=config, adapter_state_dict=weights)
        base.add_adapter(config)
        with pytest.raises(ValueError, match=r"1 \(.*model.norm.weight\) unexpected"):
            set_peft_model_state_dict(base, weights)
        assert base.model.norm.weight.ne(0).all()

    def test_embeddings_that_no_module_to_save_names(self, adapt, make_base, make_batch, output, moved, tmp_path):
        """PEFT saves them where the vocabulary was resized."""

        def resized():
            torch.manual_seed(2)
            base = make_base("llama")
            base.resize_token_embeddings(70)
            return base

        model = moved(
            get_peft_model(resized(), adapt("llama", target_modules=["q_proj"]).peft_config["default"])
        ).eval()
        model.base_model.model.model.embed_tokens.weight.data[65:] = 1.0
        model.save_pretrained(tmp_path, save_embedding_layers=True)
        batch = make_batch("llama")
        batch["input_ids"][0, 2] = 66
        told = r"the base model's .*lm_head.weight, .*embed_tokens.weight, which replace"
        with pytest.warns(UserWarning, match=told):
            loaded = PeftModel.from_pretrained(resized(), tmp_path)
        assert torch.equal(output(loaded.eval(), batch), output(model, batch))
        base = resized()
        with pytest.warns(UserWarning, match=told):
            base.load_adapter(tmp_path)
        assert torch.equal(base.eval()(**batch).logits, model(**batch).logits)
        tampered(tmp_path, modules_to_save=["embed_tokens", "lm_head"])
        loaded = PeftModel.from_pretrained(resized(), tmp_path)
        assert torch.equal(output(loaded, batch), output(model, batch))
        loaded.save_pretrained(tmp_path / "again", save_embedding_layers=True)
        again = PeftModel.from_pretrained(resized(), tmp_path / "again")
        assert torch.equal(output(again, batch), output(model, batch))

    @pytest.mark.parametrize("how", LOADERS)
    def test_fields_of_a_later_version_are_warned_of(self, how, saved, make_base, make_batch, output):
        model, folder = saved()
        tampered(folder, from_tomorrow=True, num_atom=3)
        base = make_base("llama")
        with pytest.warns(UserWarning, match=r"Unexpected keyword arguments \['from_tomorrow', 'num_atom'\]"):
            loaded = LOADERS[how](base, folder)
        batch = make_batch("llama")
        assert torch.equal(output(base if how == "transformers" else loaded, batch), output(model, batch))

    def test_another_base_model(self, saved, make_base):
        _, folder = saved("gpt2", target_modules=r".*\.(c_attn|q_proj)")
        with pytest.raises(ValueError, match="another base model or config"):
            PeftModel.from_pretrained(make_base("llama"), folder)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"num_atoms": -1}, "num_atoms must be >= 1, got -1"),
            ({"num_atoms": 1}, "top_k must be at most num_atoms = 1, got 2"),
            ({"top_k": 100}, "top_k must be at most num_atoms = 9, got 100"),
            ({"router": "tree"}, "router must be one of"),
            ({"scale": 0.0}, "scale must be finite and > 0"),
            ({"share_bank": True}, "weights must be those of its config .* unexpected"),
            ({"target_modules": ["q_proj"]}, "weights must be those of its config .* unexpected"),
            ({"router": "low_rank"}, "weights must be those of its config"),
        ],
    )
    def test_a_changed_config(self, change, message, saved, make_base):
        _, folder = saved()
        tampered(folder, **change)
        with pytest.raises(ValueError, match=message):
            PeftModel.from_pretrained(make_base("llama"), folder)

    @pytest.mark.parametrize("change", [{"num_atoms": "many"}, {"top_k": 1.5}])
    def test_a_config_of_other_types(self, change, saved, make_base):
        _, folder = saved()
        tampered(folder, **change)
        with pytest.raises(TypeError, match="must be an int"):
            PeftModel.from_pretrained(make_base("llama"), folder)

    def test_another_number_of_atoms(self, saved, make_base):
        _, folder = saved()
        tampered(folder, num_atoms=8)
        with pytest.raises(RuntimeError, match="size mismatch"):
            PeftModel.from_pretrained(make_base("llama"), folder)


class TestConfig:
    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"target_modules": ".*q_proj", "layers_to_transform": [0]}, "layers_to_transform must be None"),
            ({"target_modules": ["q_proj"], "layers_pattern": "h"}, "layers_to_transform must be given"),
            ({"method": "molora", "num_experts": 0}, "num_experts must be >= 1, got 0"),
            ({"method": "molora", "top_k": 5}, "top_k must be at most num_experts = 4, got 5"),
            ({"method": "molora", "aux_weight": -1.0}, "aux_weight must be finite and >= 0"),
            ({"method": "molora", "impl": "fast"}, "impl must be one of"),
            ({"method": "molora", "router_norm": "batch"}, "router_norm must be one of"),
            ({"method": "molora", "scale": float("inf")}, "scale must be finite and > 0, got inf"),
            ({"z_weight": -1.0}, "z_weight must be finite and >= 0"),
        ],
    )
    def test_refuses(self, fields, message, make_config):
        with pytest.raises(ValueError, match=message):
            make_config(**fields)

    @pytest.mark.parametrize("kind", ["mlp", "dscgpt"])
    def test_has_no_default_targets_for_every_model(self, kind, adapt):
        with pytest.raises(ValueError, match="specify `target_modules`"):
            adapt(kind)

    def test_has_the_fields_of_the_layer(self, make_config):
        from dataclasses import fields

        from torchdsc.nn import DSCOptions

        names = {field.name for field in fields(DSCOptions)}
        assert names <= {field.name for field in fields(make_config())}
        assert make_config(eps=1e-3, scale=2.0).options() == DSCOptions(
            **{**vars(make_config().options()), "eps": 1e-3, "scale": 2.0}
        )


def test_weights_of_one_expert_are_its_probabilities_by_default(make_config):
    config = make_config("molora", top_k=1)
    assert config.normalize_weights is False
    assert config.to_dict()["normalize_weights"] is False
    assert make_config("molora", top_k=2).normalize_weights is True
    # As saved before: evaluated with a weight of 1.
    assert make_config("molora", top_k=1, normalize_weights=True).normalize_weights is True
