"""Many small adapters over the banks of one: routers and gammas alone differ."""

import pytest
import torch
from peft import PeftModel, get_peft_model
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


def test_other_banks_than_those_it_was_trained_over_are_refused(model, make_base, tmp_path):
    adapted, _ = model
    adapted.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make_base("llama"), tmp_path)
    loaded.load_adapter(tmp_path / "law", "law")
    with torch.no_grad():
        next(iter(layers(adapted, "default").values())).bank.v[0, 0] += 1e-3
    adapted.save_pretrained(tmp_path / "others", selected_adapters=["default"])
    loaded = PeftModel.from_pretrained(make_base("llama"), tmp_path / "others")
    with pytest.raises(ValueError, match="the banks of 'default' must be those that the adapter 'law'"):
        loaded.load_adapter(tmp_path / "law", "law")


def test_a_bank_that_no_other_uses_any_more_is_trained_again(model):
    adapted, _ = model
    adapted.set_adapter("default")
    adapted.delete_adapter("law")
    assert not {"u", "v"} & trained(adapted)
    adapted.delete_adapter("medicine")
    assert {"u", "v"} <= trained(adapted)


@pytest.mark.parametrize("targets", [["q_proj", "o_proj"], ["q_proj"]], ids=["all", "some"])
@pytest.mark.parametrize("share_bank", [False, True])
def test_no_adapter_trains_a_lent_bank(adapt, make_config, targets, share_bank):
    adapted = adapt("llama", target_modules=["q_proj", "o_proj"], share_bank=share_bank)
    adapted.add_adapter("law", make_config(target_modules=targets, bank_of="default"))

    def lent():
        return [layers(adapted, "default")[name].bank for name in layers(adapted, "law")]

    assert not any(parameter.requires_grad for bank in lent() for parameter in bank.parameters()), "at once"
    for name in ("law", "default"):
        adapted.set_adapter(name)
        assert not any(parameter.requires_grad for bank in lent() for parameter in bank.parameters())


@pytest.mark.parametrize("casts", [(True, True), (True, False), (False, True), (False, False)])
def test_a_base_model_of_another_dtype(make_base, make_config, moved, make_batch, output, casts):
    """Neither the lender's numbers nor its dtype change when its banks are used."""
    base = make_base("llama", torch.bfloat16)
    config = make_config(target_modules=TARGETS)
    adapted = moved(get_peft_model(base, config, autocast_adapter_dtype=casts[0])).eval()
    batch = make_batch("llama")
    before = output(adapted, batch)
    banks = {name: layer.bank.u.clone() for name, layer in layers(adapted, "default").items()}
    adapted.add_adapter(
        "law", make_config(target_modules=TARGETS, bank_of="default", **SMALL), autocast_adapter_dtype=casts[1]
    )
    for name, layer in layers(adapted, "default").items():
        assert layer.bank.u.dtype == banks[name].dtype
        assert torch.equal(layer.bank.u, banks[name])
    assert torch.equal(output(adapted, batch), before)
    adapted.set_adapter("law")
    assert output(adapted, batch).isfinite().all()


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
        ValueError, match=r"bank_of must be an adapter that '.*' has, .* \[\], got 'default': load that one"
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
    assert set(adapted.peft_config) == {"default", "law", "medicine"}
    adapted.delete_adapter("medicine")
    assert torch.equal(output(adapted, batch), before)


def test_errors(model, make_config):
    adapted, _ = model
    with pytest.raises(ValueError, match=r"with a bank of its own, \['default'\], got 'law'"):
        adapted.add_adapter("child", make_config(target_modules=TARGETS, bank_of="law"))
    with pytest.raises(ValueError, match="bank_of must be None for share_bank or train_atoms_only, got 'default'"):
        DSCAdapterConfig(bank_of="default", share_bank=True)
    with pytest.raises(ValueError, match=r"num_atoms must be that of the bank of 'default' at '.*', 9, got 12"):
        adapted.add_adapter("other", make_config(target_modules=TARGETS, bank_of="default", num_atoms=12))
    with pytest.raises(ValueError, match=r"bank_of must be an adapter that '.*v_proj' has, .* \[\], got 'default'"):
        adapted.add_adapter("third", make_config(target_modules=["v_proj"], bank_of="default"))
