"""Each sign of failure, provoked; and that healthy training shows none."""

import json
import math
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

from torchdsc import DSC, Residual, build_optimizer, recommended, regularization
from torchdsc.diagnostics import Diagnostics, DiagnosticsWarning, LayerHealth, ModelHealth, findings, slow_path
from torchdsc.diagnostics.findings import warn
from torchdsc.ops import native


def codes(model, x, history=(), before=None):
    """Codes of what is found after a forward pass, with ``before`` called between begin and end."""
    diagnostics = Diagnostics(model)
    diagnostics.begin()
    model(x)
    if before is not None:
        before()
    return [finding.code for finding in findings(diagnostics.end(), history)]


@pytest.fixture
def layer():
    return DSC(16, num_atoms=40, top_k=2)


@pytest.fixture
def x():
    return torch.randn(60, 16)


def quiet(norm=1.0):
    """A measurement without layers."""
    return ModelHealth([], {"atoms": norm})


def test_fresh_layers_are_healthy(layer, x):
    assert codes(layer, x) == []
    seen = recommended(num_atoms=40)
    assert (
        codes(DSC(16, **{name: seen[name] for name in ("num_atoms", "top_k", "gamma_init", "frame_weight")}), x) == []
    )


def test_signal_collapse(layer, x):
    layer.router.bias = nn.Parameter(torch.full((40,), -8.0))
    assert "signal-collapse" in codes(layer, x)


def test_routing_collapse(layer, x):
    layer.router.bias = nn.Parameter(torch.tensor([9.0, 8.0] + 38 * [0.0]))
    assert "routing-collapse" in codes(layer, x)


def test_routing_collapse_has_to_last():
    collapsed, healthy = (
        ModelHealth([LayerHealth("0", 40, 2, tokens=64, effective_atoms=effective)], {}) for effective in (2.5, 30.0)
    )
    assert findings(collapsed, [healthy]) == []
    assert [finding.code for finding in findings(collapsed, [healthy, collapsed])] == ["routing-collapse"]


def test_few_tokens_use_few_atoms_in_health(layer, x):
    layer.router.bias = nn.Parameter(torch.tensor([9.0, 8.0] + 38 * [0.0]))
    assert "routing-collapse" not in codes(layer, x[:8])


def test_bank_collapse_of_a_wide_side(x):
    layer, x = DSC(256, 4, num_atoms=512, top_k=2), torch.randn(60, 256)
    with torch.no_grad():
        layer.bank.u.copy_(layer.bank.u[:1] + 1e-4 * torch.randn_like(layer.bank.u))
    assert codes(layer, x) == ["bank-collapse"]


def test_gate_on_the_mean_may_saturate_with_many_atoms(x):
    layer = DSC(16, num_atoms=40, top_k=8, gate="mean")
    layer.router.bias = nn.Parameter(torch.full((40,), 6.0))
    assert codes(layer, x) == ["saturated-gate"]


@pytest.mark.parametrize("side", ["u", "v"])
def test_bank_collapse(x, side):
    layer, x = DSC(64, num_atoms=100, top_k=2), torch.randn(60, 64)
    rows = getattr(layer.bank, side)
    with torch.no_grad():
        rows.copy_(rows[:1] + 1e-4 * torch.randn_like(rows))
    assert codes(layer, x) == ["bank-collapse"]


def test_clamped_logits(layer, x):
    nn.init.normal_(layer.router.weight, std=30.0)
    assert "logits-clamped" in codes(layer, x)


def test_gate_saturated_from_the_start(layer, x):
    layer.router.bias = nn.Parameter(torch.full((40,), 6.0))
    assert codes(layer, x) == ["saturated-gate"]


def test_gate_of_many_atoms_is_one_by_design(x):
    assert codes(DSC(16, num_atoms=40, top_k=32), x) == []


def test_steps_larger_than_the_rows(layer, x):
    # The gradient of a raw row is inversely proportional to its norm.
    optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)

    def step():
        for rows in (layer.bank.u, layer.bank.v):
            rows.data.mul_(0.01 / rows.norm(dim=1, keepdim=True))
        optimizer.zero_grad()
        (layer(x).square().mean() + regularization(layer).total).backward()
        optimizer.step()

    step()
    assert codes(layer, x, before=step) == []  # At the first measurement the small initial rows are meant.
    assert codes(layer, x, [quiet()], before=step) == ["atoms-turn"]


def test_projection_onto_unit_norms_is_missing(layer, x, monkeypatch):
    with torch.no_grad():
        layer.bank.u.mul_(300), layer.bank.v.mul_(300)
    whole = type(layer.bank).forward

    def raw(bank, tokens, indices=None, *rest, **options):
        if tokens is None and indices is not None:
            return bank.u[indices], bank.v[indices]
        return whole(bank, tokens, indices, *rest, **options)

    monkeypatch.setattr(type(layer.bank), "forward", raw)
    assert codes(layer, x) == ["norm-above-bound"]


class TestExplodingGradients:
    def test_norm_is_far_above_those_before(self):
        before = [quiet(norm) for norm in (1.0, 2.0, 30.0)]
        assert findings(quiet(150.0), before) == []
        (finding,) = findings(quiet(250.0), before)
        assert finding.code == "exploding-gradients"
        assert "mostly of atoms" in finding.sign

    def test_few_measurements_do_not_decide(self):
        assert findings(quiet(1e6), [quiet(), quiet()]) == []

    @pytest.mark.parametrize("norm", [math.inf, math.nan])
    def test_not_finite(self, norm):
        (finding,) = findings(ModelHealth([], {"atoms": 1.0, "gamma": norm}))
        assert finding.code == "exploding-gradients"
        assert "mostly of gamma" in finding.sign

    def test_without_projection_gradients_explode(self):
        """A bank composed without its norms, and rows that shrink: 1 / norm^2 in the gradient of atoms."""
        layer, x = DSC(16, num_atoms=40, top_k=2, atom_init_norm=1.0, frame_weight=0.0), torch.randn(60, 16)
        diagnostics, history = Diagnostics(layer), []
        for scale in (1.0, 1.0, 1.0, 1e-4):
            with torch.no_grad():
                layer.bank.u.mul_(scale)
            layer.zero_grad()
            diagnostics.begin()
            (layer(x).square().sum() + regularization(layer).total).backward()
            history.append(diagnostics.end())
        assert [finding.code for finding in findings(history[-1], history[:-1])] == ["exploding-gradients"]


class TestSlowPath:
    def test_an_implementation_that_was_asked_for(self):
        layer = DSC(8, num_atoms=9, top_k=2, impl="reference")
        assert slow_path(nn.Sequential(layer)).where == ("0",)

    def test_without_the_compiled_functions(self, layer, monkeypatch):
        monkeypatch.setattr(native, "_native", None)
        assert "compiled functions are not installed" in str(slow_path(layer))

    @pytest.mark.skipif(native.build_name() is None, reason="needs the compiled functions")
    def test_nothing_to_say(self, layer):
        assert slow_path(layer) is None

    def test_no_layers_of_that_kind(self):
        assert slow_path(nn.Linear(2, 2)) is None or native.build_name() is None


def test_healthy_training_shows_nothing(x):
    model = Residual(nn.Linear(16, 16), DSC(16, num_atoms=40, top_k=4))
    optimizer = build_optimizer(model, learning_rate=4e-3, weight_decay=0.02, router_lr_multiplier=5.0)
    diagnostics, history, target = Diagnostics(model), [], torch.randn(16, 16)
    for step in range(120):
        if step % 10 == 0:
            diagnostics.begin()
        tokens = torch.randn(64, 16)
        optimizer.zero_grad()
        ((model(tokens) - tokens @ target).square().mean() + regularization(model).total).backward()
        optimizer.step()
        if step % 10 == 0:
            health = diagnostics.end()
            assert findings(health, history) == []
            history.append(health)


def test_a_finding_says_where_and_what_to_do():
    layers = [LayerHealth(f"blocks.{i}", 40, 2, gate=0.001, strength=0.001) for i in range(5)]
    (finding,) = findings(ModelHealth(layers, {}))
    text = str(finding)
    assert text.startswith("signal-collapse in blocks.0, blocks.1, blocks.2 and 2 more: ")
    assert "Cause: " in text
    assert "Remedy: raise budget" in text


def test_each_sign_is_warned_of_once():
    found, known = findings(quiet(math.nan)), set()
    with pytest.warns(DiagnosticsWarning, match="exploding-gradients"):
        warn(found, known)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn(found, known)


COMMITTED = sorted((Path(__file__).parents[2] / "experiments").glob("*/results.json"))


def test_no_committed_run_shows_a_sign_in_its_routing():
    """What records have of the routing at the end of training; those of later experiments name all signs themselves."""
    judged = 0
    for file in COMMITTED:
        for run in json.loads(file.read_text(encoding="utf-8")).get("runs", []):
            routing = run.get("routing") or {"layers": [], "history": []}
            options = {**run["config"], **(run.get("plan") or {}).get("options", {})}
            top_k = options.get("top_k") or options.get("experts_per_token")
            shared = ("num_atoms", "utilization", "effective_atoms", "gate", "strength")
            layers = [
                LayerHealth("", top_k=top_k, tokens=32_768, **{name: layer.get(name) for name in shared})
                for layer in routing["layers"]
                if top_k
            ]
            assert findings(ModelHealth(layers, {}), [quiet()]) == [], (file, run["variant"], run["seed"])
            judged += bool(layers)
    assert judged > 100
