"""Atoms that are counted, kept, added and removed."""

import json
from typing import ClassVar

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file

from torchdsc.adapters import (
    DSCAdapterConfig,
    add_atoms,
    atoms_used_by,
    freeze_atoms,
    remove_atoms,
    scale_adapter,
    signal_strength,
)
from torchdsc.diagnostics.routing import gates_of

TARGETS = ["q_proj", "v_proj", "mlp"]
SHARING = {
    "private": {},
    "bank": {"share_bank": True},
    "router": {"share_router": True},
    "both": {"share_bank": True, "share_router": True},
    "low_rank": {"router": "low_rank", "router_rank": 4, "share_bank": True, "router_bias": True},
}


@pytest.fixture
def model(adapt, make_batch):
    """Makes a model with an adapter that does something, and a batch."""

    def make(kind="llama", **options):
        return adapt(kind, target_modules=TARGETS, moved=True, **options), make_batch(kind)

    return make


def layers(model, name="default"):
    return {m.target: m.adapters[name] for m in model.modules() if hasattr(m, "adapters") and name in m.adapters}


def train(model, batch, steps=3):
    """With all that an optimizer does to parameters that it has: momentum and decay."""
    model.train()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.5)
    for _ in range(steps):
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
    model.eval()


def state(layer):
    """Rows by atom, whether kept or not, and the rest."""
    rows = {name: layer.bank.all_rows(name) for name in ("u", "v")} | {"weight": layer.router.all_rows("weight")}
    rest = {
        name: parameter
        for name, parameter in layer.named_parameters()
        if not name.startswith(("bank.", "router.weight", "router.kept_", "router.bias"))
    }
    return {name: value.detach().clone() for name, value in {**rows, **rest}.items()}


@pytest.mark.parametrize("sharing", SHARING)
class TestAddAndRemove:
    def test_removing_restores_every_bit(self, model, output, sharing):
        adapted, batch = model(**SHARING[sharing])
        before, states = output(adapted, batch), {name: state(layer) for name, layer in layers(adapted).items()}
        trained = {name for name, p in adapted.named_parameters() if p.requires_grad}
        add_atoms(adapted, 5, origin="law")
        assert {layer.options.num_atoms for layer in layers(adapted).values()} == {14}
        train(adapted, batch)
        assert not torch.equal(output(adapted, batch), before), "the new atoms learn"
        for name, layer in layers(adapted).items():
            for part, value in states[name].items():
                now = state(layer)[part]
                assert torch.equal(now[:9] if part in ("u", "v", "weight") else now, value), (name, part)
        remove_atoms(adapted, origin="law")
        assert torch.equal(output(adapted, batch), before)
        # All is as before the addition: what is trained, and the names.
        assert {name for name, p in adapted.named_parameters() if p.requires_grad} == trained
        assert adapted.peft_config["default"].atom_origins == ["first"]
        with pytest.raises(ValueError, match=r"origin must be one of \['first'\], got 'law'"):
            remove_atoms(adapted, origin="law")
        add_atoms(adapted, 2, origin="law")

    def test_new_atoms_are_selected_and_trained(self, model, sharing):
        adapted, batch = model(**SHARING[sharing])
        add_atoms(adapted, 5, origin="law")
        used = atoms_used_by(adapted, [batch])
        assert sum(int(counts[9:].sum()) for counts in used.values()) > 0
        before = {name: state(layer) for name, layer in layers(adapted).items()}
        for now in before.values():
            # Each is a copy of an old one, and yet not the same.
            distance = torch.cdist(now["u"][9:], now["u"][:9]).amin(1) / now["u"][9:].norm(dim=1)
            assert ((distance > 0) & (distance < 0.5)).all()
        train(adapted, batch)
        changed = [
            not torch.equal(state(layer)[part][9:], before[name][part][9:])
            for name, layer in layers(adapted).items()
            for part in ("u", "v", "weight")
        ]
        assert all(changed)

    def test_saved_and_loaded(self, model, make_base, output, tmp_path, sharing):
        adapted, batch = model(**SHARING[sharing])
        for origin in ("law", "medicine"):
            add_atoms(adapted, 3, origin=origin)
            train(adapted, batch)
        adapted.save_pretrained(tmp_path)
        weights = load_file(tmp_path / "adapter_model.safetensors")
        origins = [key for key in weights if key.endswith("bank.origin")]
        assert len(origins) == len({id(layer.bank) for layer in layers(adapted).values()}), "shared ones once"
        config = json.loads((tmp_path / "adapter_config.json").read_text())
        assert config["atom_origins"] == ["first", "law", "medicine"]
        assert set(map(tuple, config["atom_counts"].values())) == {(15, 12, 0, 0, 0)}
        loaded = PeftModel.from_pretrained(make_base("llama"), tmp_path, is_trainable=True)
        loaded.eval()
        assert torch.equal(output(loaded, batch), output(adapted, batch))
        for layer in layers(loaded).values():
            assert layer.bank.origin.tolist() == [0] * 9 + [1] * 3 + [2] * 3
        trained = {name for name, parameter in loaded.named_parameters() if parameter.requires_grad}
        assert trained == {name for name, parameter in adapted.named_parameters() if parameter.requires_grad}
        by_transformers = make_base("llama")
        by_transformers.load_adapter(tmp_path, is_trainable=True)
        assert torch.equal(output(by_transformers, batch), output(adapted, batch))
        assert {name.rpartition(".")[2] for name, p in by_transformers.named_parameters() if p.requires_grad} == {
            name.rpartition(".")[2] for name in trained
        }
        # One thing that was learnt goes, the other stays.
        for one in (loaded, adapted):
            remove_atoms(one, origin="law")
        assert torch.equal(output(loaded, batch), output(adapted, batch))
        assert loaded.peft_config["default"].atom_origins == ["first", "medicine"]
        assert {tuple(layer.bank.origin.tolist()) for layer in layers(loaded).values()} == {(*[0] * 9, *[1] * 3)}

    def test_freezing(self, model, output, sharing):
        adapted, batch = model(**SHARING[sharing])
        before, used = output(adapted, batch), atoms_used_by(adapted, [batch])
        often = {name: counts > counts.float().quantile(0.6) for name, counts in used.items()}
        freeze_atoms(adapted, often)
        torch.testing.assert_close(output(adapted, batch), before, rtol=1e-5, atol=1e-6)
        states = {name: state(layer) for name, layer in layers(adapted).items()}
        kept = {name: layer.bank.kept_atoms for name, layer in layers(adapted).items()}
        assert all(kept[name] >= int(mask.sum()) for name, mask in often.items())
        train(adapted, batch)
        for name, layer in layers(adapted).items():
            now, count = state(layer), kept[name]
            assert all(torch.equal(now[part][:count], states[name][part][:count]) for part in ("u", "v", "weight"))
            assert not torch.equal(now["u"][count:], states[name]["u"][count:])
            assert not torch.equal(now["gamma"], states[name]["gamma"])


def test_removing_gives_back_what_was_trained_before(model, output):
    adapted, batch = model()
    some = {name: torch.arange(layer.options.num_atoms) < 2 for name, layer in layers(adapted).items()}
    freeze_atoms(adapted, some)
    trained = {name for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    before = output(adapted, batch)
    add_atoms(adapted, 3, origin="law")
    train(adapted, batch)
    add_atoms(adapted, 2, origin="medicine")
    train(adapted, batch)
    remove_atoms(adapted, origin="medicine")
    # The atoms of law alone are trained.
    assert {(layer.bank.num_atoms, layer.bank.kept_atoms) for layer in layers(adapted).values()} == {(12, 9)}
    train(adapted, batch)
    remove_atoms(adapted, origin="law")
    assert torch.equal(output(adapted, batch), before)
    assert {layer.bank.kept_atoms for layer in layers(adapted).values()} == {2}
    assert {name for name, parameter in adapted.named_parameters() if parameter.requires_grad} == trained
    rest = {name: torch.arange(layer.options.num_atoms) >= 2 for name, layer in layers(adapted).items()}
    with pytest.raises(ValueError, match=r"atoms must leave one to train at .*, got none beside 2 kept ones"):
        remove_atoms(adapted, rest)


def test_a_new_adapter_with_the_config_of_a_grown_one_is_told_that_it_learns_nothing(model, make_base, tmp_path):
    adapted, batch = model()
    add_atoms(adapted, 3, origin="law")
    adapted.save_pretrained(tmp_path)
    config = DSCAdapterConfig.from_pretrained(tmp_path)
    config.inference_mode = False
    new = get_peft_model(make_base("llama"), config)
    with pytest.warns(RuntimeWarning, match="atoms alone are trained .* nothing can be learnt.*leave them out"):
        train(new, batch, steps=1)


def test_what_is_kept_stays_kept(model):
    adapted, batch = model()
    for place in (8, 3):
        freeze_atoms(adapted, {name: torch.arange(9) == place for name in layers(adapted)})
    assert {layer.bank.kept_atoms for layer in layers(adapted).values()} == {2}
    before = {name: state(layer) for name, layer in layers(adapted).items()}
    train(adapted, batch)
    for name, layer in layers(adapted).items():
        assert torch.equal(state(layer)["u"][:2], before[name]["u"][:2])


def test_a_config_given_twice_stays_as_it_is(make_base, make_config, moved):
    config = make_config(target_modules=["mlp"])
    first = moved(get_peft_model(make_base("llama"), config))
    add_atoms(first, 5, origin="law")
    second = get_peft_model(make_base("llama"), config)
    assert {layer.options.num_atoms for layer in layers(second).values()} == {9}
    assert config.atom_counts is None
    assert config.atom_origins is None


def test_what_is_kept_is_not_freed_by_peft(model):
    adapted, _ = model()
    add_atoms(adapted, 5, origin="law")
    adapted.set_requires_grad("default", requires_grad=True)
    assert {name.rpartition(".")[2] for name, p in adapted.named_parameters() if p.requires_grad} == {
        "u",
        "v",
        "weight",
    }


def test_counts(model):
    adapted, batch = model()
    used = atoms_used_by(adapted, [batch, batch])
    tokens = int(batch["attention_mask"].sum())
    assert {name: int(counts.sum()) for name, counts in used.items()} == dict.fromkeys(layers(adapted), 2 * 2 * tokens)
    # Atoms that a text never used can go, and the text's outputs do not change.
    before = adapted(**batch).logits[batch["attention_mask"].bool()]
    remove_atoms(adapted, {name: counts == 0 for name, counts in used.items()})
    assert any(layer.options.num_atoms < 9 for layer in layers(adapted).values())
    torch.testing.assert_close(adapted(**batch).logits[batch["attention_mask"].bool()], before)


def test_counting_leaves_the_model_as_it_is(model):
    adapted, batch = model()
    adapted.train()
    adapted.base_model.model.lm_head.eval()
    modes = [module.training for module in adapted.modules()]
    atoms_used_by(adapted, [batch])
    assert [module.training for module in adapted.modules()] == modes
    assert not any(layer.router._forward_hooks for layer in layers(adapted).values())


def test_another_adapter_is_left_alone(model, make_config, output):
    adapted, batch = model()
    adapted.add_adapter("other", make_config(target_modules=TARGETS, gamma_init=0.01))
    before = output(adapted, batch)
    add_atoms(adapted, 4, origin="law", adapter_name="other")
    assert {layer.options.num_atoms for layer in layers(adapted).values()} == {9}
    assert {layer.options.num_atoms for layer in layers(adapted, "other").values()} == {13}
    assert torch.equal(output(adapted, batch), before)
    adapted.set_adapter("other")
    trained = {name.rpartition(".")[2] for name, p in adapted.named_parameters() if p.requires_grad}
    assert trained == {"u", "v", "weight"}
    adapted.set_adapter("default")
    assert {name.rpartition(".")[2] for name, p in adapted.named_parameters() if p.requires_grad} == {
        *trained,
        "gamma",
    }


def test_atoms_alone_can_be_trained_from_the_start(adapt):
    trained = adapt("llama", target_modules=["mlp"], train_atoms_only=True, gamma_init=0.01)
    names = {name.rpartition(".")[2] for name, p in trained.named_parameters() if p.requires_grad}
    assert names == {"u", "v", "weight"}
    with pytest.raises(ValueError, match="gamma_init must not be 0 for train_atoms_only"):
        DSCAdapterConfig(target_modules=["mlp"], train_atoms_only=True)


class TestSignalStrength:
    SEEN: ClassVar = {"target_modules": ["q_proj", "mlp"], "router_input": "embeddings", "router_context": 3}

    def test_is_that_of_a_pass(self, adapt, make_batch):
        adapted, batch = adapt("llama", moved=True, input_context=2, **self.SEEN), make_batch("llama")
        mask, found = batch["attention_mask"].bool(), []
        for layer in layers(adapted).values():
            layer.router.register_forward_hook(
                lambda _, __, out, layer=layer: found.append(gates_of(layer, out.logits)[0])
            )
        adapted(**{name: batch[name] for name in ("input_ids", "attention_mask")})
        expected = torch.stack([strength[mask.flatten()].mean() for strength in found]).mean()
        strength = signal_strength(adapted, batch["input_ids"], batch["attention_mask"])
        torch.testing.assert_close(strength, expected)

    def test_gate_closes(self, adapt, make_batch):
        adapted, batch = adapt("llama", moved=True, **self.SEEN).train(), make_batch("llama")
        ids = batch["input_ids"]
        before = signal_strength(adapted, ids)
        before.backward()
        with torch.no_grad():
            for parameter in adapted.parameters():
                if parameter.grad is not None:
                    parameter -= 0.05 * parameter.grad
        assert signal_strength(adapted, ids) < before
        # It leaves nothing to collect.
        adapted(**batch).loss.backward()

    @pytest.mark.parametrize("options", [{}, {"router": "ngram", "num_atoms": 8}], ids=["hidden", "ngrams"])
    def test_other_routers(self, adapt, make_batch, options):
        adapted = adapt("llama", target_modules=["mlp"], **options)
        with pytest.raises(ValueError, match="router_input must be 'embeddings', and router no 'ngram'"):
            signal_strength(adapted, make_batch("llama")["input_ids"])


class TestScaleAdapter:
    @pytest.mark.parametrize("options", [{}, {"max_update_norm": 0.5}], ids=["free", "bounded"])
    def test_update_is_multiplied(self, model, output, tmp_path, options):
        adapted, batch = model(**options)
        [first, *_] = layers(adapted).values()
        x = torch.randn(2, 5, first.in_features)
        update = first(x)
        assert update.abs().max() > 1e-3
        scale_adapter(adapted, 0.25)
        torch.testing.assert_close(first(x), 0.25 * update)
        adapted.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(adapted.unload(), tmp_path)
        torch.testing.assert_close(next(iter(layers(loaded).values()))(x), 0.25 * update)
        scale_adapter(loaded, 0.0)
        with loaded.disable_adapter():
            base = output(loaded, batch)
        assert torch.equal(output(loaded, batch), base)

    def test_other_adapters_stay(self, model):
        adapted, _ = model()
        adapted.add_adapter("other", DSCAdapterConfig(target_modules=TARGETS, gamma_init=0.1))
        scale_adapter(adapted, 0.5, adapter_name="other")
        before = {name: layer.gamma.clone() for name, layer in layers(adapted).items()}
        assert all((layer.gamma == 0.05).all() for layer in layers(adapted, "other").values())
        scale_adapter(adapted, 0.5)
        assert all(torch.equal(layer.gamma, 0.5 * before[name]) for name, layer in layers(adapted).items())
        assert all((layer.gamma == 0.05).all() for layer in layers(adapted, "other").values())

    @pytest.mark.parametrize("factor", [-0.1, 1.5, float("nan")])
    def test_factor_is_checked(self, model, factor):
        adapted, _ = model()
        before = state(layers(adapted)[next(iter(layers(adapted)))])
        with pytest.raises(ValueError, match=rf"factor must be in \[0, 1\], got {factor}"):
            scale_adapter(adapted, factor)
        after = state(layers(adapted)[next(iter(layers(adapted)))])
        assert all(torch.equal(before[name], after[name]) for name in before)


class TestErrors:
    def test_names(self, model):
        adapted, batch = model()
        with pytest.raises(ValueError, match=r"adapter_name must be that of a DSC adapter .* \['default'\], got 'x'"):
            add_atoms(adapted, 1, origin="law", adapter_name="x")
        with pytest.raises(ValueError, match=r"origin must be a new name, got 'first' of \['first'\]"):
            add_atoms(adapted, 1, origin="first")
        with pytest.raises(ValueError, match=r"origin must be one of \['first'\], got 'law'"):
            remove_atoms(adapted, origin="law")
        with pytest.raises(ValueError, match="either atoms or origin must be given"):
            remove_atoms(adapted)
        with pytest.raises(ValueError, match=r"atoms must be masks of the adapter's targets, .* got \['x'\]"):
            freeze_atoms(adapted, {"x": torch.ones(9, dtype=torch.bool)})
        with pytest.raises(ValueError, match="batches must run every target of adapter 'default'"):
            atoms_used_by(adapted, [])
        for batches, got in (
            (batch["input_ids"], "Tensor in a Tensor"),
            (batch, "str in a dict"),
            ([[1, 2]], "list in"),
        ):
            with pytest.raises(TypeError, match=f"batches must hold mappings .* such as .*, got a {got}"):
                atoms_used_by(adapted, batches)
        with adapted.disable_adapter(), pytest.raises(ValueError, match="must be active"):
            atoms_used_by(adapted, [batch])

    def test_nothing_to_build_on(self, adapt, model, make_base, tmp_path):
        fresh = adapt("llama", target_modules=["mlp"])
        with pytest.raises(ValueError, match="gamma must not be 0, as new atoms act through the gamma that is there"):
            add_atoms(fresh, 1, origin="law")
        adapted, _ = model()
        adapted.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(make_base("llama"), tmp_path)
        with pytest.raises(ValueError, match="load the adapter with is_trainable=True"):
            add_atoms(loaded, 1, origin="law")
        headed, _ = model(modules_to_save=["lm_head"])
        with pytest.raises(ValueError, match="modules_to_save must be None, as these modules would go on training"):
            add_atoms(headed, 1, origin="law")

    def test_counts_in_a_config(self, make_config, make_base):
        for counts in ([9, 9, 0], [9, -2, 0], [9], [9, 0], [1, 0, 0]):
            with pytest.raises(ValueError, match="atom_counts must be M >= top_k = 2, 0 <= kept < M, and a number"):
                make_config(target_modules=["mlp"], atom_counts={"x": counts})
        with pytest.raises(ValueError, match="atom_origins must be one name or more, all different"):
            make_config(target_modules=["mlp"], atom_origins=["law", "law"])
        with pytest.raises(ValueError, match=r"atom_counts must be of targets, .* got \['nowhere'\]"):
            get_peft_model(make_base("llama"), make_config(target_modules=["mlp"], atom_counts={"nowhere": [9, 0, 0]}))

    def test_masks(self, model):
        adapted, _ = model()
        name = next(iter(layers(adapted)))
        with pytest.raises(TypeError, match=r"atoms\['.*'\] must be a bool tensor, got torch.float32"):
            freeze_atoms(adapted, {name: torch.ones(9)})
        with pytest.raises(ValueError, match=r"must have the shape \(9,\), got \(8,\)"):
            freeze_atoms(adapted, {name: torch.ones(8, dtype=torch.bool)})
        with pytest.raises(ValueError, match=r"atoms must leave one to train .* got all 9"):
            freeze_atoms(adapted, {name: torch.ones(9, dtype=torch.bool)})
        last = [*layers(adapted)][-1]
        with pytest.raises(ValueError, match="atoms must leave one to train"):
            freeze_atoms(adapted, {name: torch.arange(9) < 3, last: torch.ones(9, dtype=torch.bool)})
        assert {layer.bank.kept_atoms for layer in layers(adapted).values()} == {0}, "nothing is changed"
        before = layers(adapted)
        with pytest.raises(ValueError, match=r"top_k = 2 atoms must be left .* got 1"):
            remove_atoms(adapted, {name: torch.arange(9) > 0 for name in before})
        assert {layer.options.num_atoms for layer in before.values()} == {9}, "nothing is lost"
        with pytest.raises(ValueError, match="count must be >= 1, got 0"):
            add_atoms(adapted, 0, origin="law")

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"router": "product_key", "num_atoms": 16}, "router must be 'linear' or 'low_rank', got 'product_key'"),
            ({"sparse_gradients": True, "frame_weight": 0.0}, "sparse_gradients must be False, got True"),
        ],
    )
    def test_layers_that_cannot(self, model, options, message):
        adapted, _ = model(**options)
        with pytest.raises(ValueError, match=message):
            add_atoms(adapted, 1, origin="law")


def test_all_that_is_there_is_kept_in_a_base_model_of_any_dtype(make_base, make_config, make_batch, moved, output):
    base = make_base("llama", torch.float64)
    adapted = get_peft_model(base, make_config(target_modules=TARGETS, router_bias=True)).double()
    moved(adapted)
    batch = make_batch("llama", torch.float64)
    before = output(adapted, batch)
    add_atoms(adapted, 2, origin="a")
    add_atoms(adapted, 2, origin="b")
    remove_atoms(adapted, origin="b")
    remove_atoms(adapted, origin="a")
    assert torch.equal(output(adapted, batch), before)


def test_banks_over_processes_are_refused(model):
    adapted, _ = model()
    for layer in layers(adapted).values():
        layer.bank.mesh = object()
    with pytest.raises(ValueError, match="banks of adapter 'default' must be whole to change their atoms"):
        add_atoms(adapted, 2, origin="law")
    assert {layer.bank.num_atoms for layer in layers(adapted).values()} == {9}
