"""Many small adapters over the banks of one: routers and gammas alone differ."""

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from torchdsc.adapters import DSCAdapterConfig, add_atoms

TARGETS = ["q_proj", "mlp"]
SMALL = {"router": "low_rank", "router_rank": 2}


@pytest.fixture
def model(adapt, make_config, make_batch, moved):
    """An adapter, two that use its banks, and a batch."""
    adapted = adapt("llama", target_modules=TARGETS, moved=True)
    for seed, name in enumerate(("law", "medicine"), 7):
        adapted.add_adapter(name, make_config(target_modules=TARGETS, bank_of="default", **SMALL))
        adapted.set_adapter(name)
        for layer in layers(adapted, name).values():
            torch.nn.init.normal_(layer.gamma, std=0.05, generator=torch.Generator().manual_seed(seed))
    return adapted.eval(), make_batch("llama")


def layers(model, name):
    return {m.target: m.adapters[name] for m in model.modules() if hasattr(m, "adapters") and name in m.adapters}


def trained(model):
    return {name.rpartition(".")[2] for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_banks_are_the_same_and_stay_as_they_are(model, output):
    adapted, batch = model
    outputs = {}
    for name in ("default", "law", "medicine"):
        adapted.set_adapter(name)
        outputs[name] = output(adapted, batch)
        assert not {"u", "v"} & trained(adapted)
        for target, layer in layers(adapted, name).items():
            assert layer.bank is layers(adapted, "default")[target].bank
    assert not torch.equal(outputs["law"], outputs["medicine"])
    adapted.set_adapter("law")
    assert trained(adapted) == {"gamma", "down", "weight"}
    adapted.train()
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)
    adapted(**batch).loss.backward()
    optimizer.step()
    adapted.eval()
    assert not torch.equal(output(adapted, batch), outputs["law"])
    for name in ("default", "medicine"):
        adapted.set_adapter(name)
        assert torch.equal(output(adapted, batch), outputs[name])


def test_saved_without_the_banks_and_loaded(model, make_base, output, tmp_path):
    adapted, batch = model
    adapted.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "law" / "adapter_model.safetensors")
    assert {key.rpartition(".")[2] for key in weights} == {"gamma", "down", "weight"}
    assert any(key.endswith("bank.u") for key in load_file(tmp_path / "adapter_model.safetensors"))
    loaded = PeftModel.from_pretrained(make_base("llama"), tmp_path)
    loaded.load_adapter(tmp_path / "law", "law")
    for name in ("default", "law"):
        loaded.set_adapter(name)
        adapted.set_adapter(name)
        assert torch.equal(output(loaded.eval(), batch), output(adapted, batch))
    with pytest.raises(
        ValueError, match=r"bank_of must be an adapter that '.*' has, \[\], got 'default': load that one"
    ):
        PeftModel.from_pretrained(make_base("llama"), tmp_path / "law")


def test_mixed_batches(model, output):
    adapted, batch = model
    batch = {name: value for name, value in batch.items() if name != "labels"}
    alone = {}
    for name in ("law", "medicine"):
        adapted.set_adapter(name)
        alone[name] = output(adapted, batch)
    names = ["law", "medicine", "__base__", "law"]
    mixed = output(adapted, batch, adapter_names=names)
    for row, name in enumerate(names):
        if name != "__base__":
            torch.testing.assert_close(mixed[row], alone[name][row])


def test_what_is_used_is_not_taken_away(model, output):
    adapted, batch = model
    adapted.set_adapter("law")
    before = output(adapted, batch)
    with pytest.raises(ValueError, match=r"got 'default' of \['law', 'medicine'\]"):
        adapted.delete_adapter("default")
    for name in ("default", "law"):
        with pytest.raises(ValueError, match=r"banks must be those of adapter '.*' alone, got \['.*'\] with the same"):
            add_atoms(adapted, 2, origin="more", adapter_name=name)
    assert torch.equal(output(adapted, batch), before)
    adapted.delete_adapter("medicine")
    assert torch.equal(output(adapted, batch), before)


def test_errors(model, make_config):
    adapted, _ = model
    with pytest.raises(ValueError, match="bank_of must be None for share_bank or train_atoms_only, got 'default'"):
        DSCAdapterConfig(bank_of="default", share_bank=True)
    with pytest.raises(ValueError, match=r"bank must have .* = \(12, "):
        adapted.add_adapter("other", make_config(target_modules=TARGETS, bank_of="default", num_atoms=12))
    with pytest.raises(ValueError, match=r"bank_of must be an adapter that '.*v_proj' has, \[\], got 'default'"):
        adapted.add_adapter("third", make_config(target_modules=["v_proj"], bank_of="default"))
