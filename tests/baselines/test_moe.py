import sys

import pytest
import torch
from torch.nn.functional import gelu, silu

from torchdsc import build_optimizer, regularization
from torchdsc.baselines import StandardMoE

KERNELS = ("eager", "batched_mm", "grouped_mm", "auto")


def make(hidden=6, impl="auto", in_features=8, num_experts=5, top_k=2, dtype=torch.float64, **options):
    layer = StandardMoE(in_features, hidden, num_experts, top_k, impl=impl, dtype=dtype, **options)
    torch.nn.init.normal_(layer.router.linear.weight)
    return layer


def literal_loop(layer, literal_choice, x):
    """Token by token, expert by expert."""
    rows = []
    for token in x.reshape(-1, x.shape[-1]):
        row = torch.zeros_like(token)
        for expert, weight in literal_choice(layer.router, token):
            if layer.experts.has_gate:
                gate, up = (layer.experts.gate_up_proj[expert] @ token).chunk(2)
                hidden = silu(gate) * up
            else:
                hidden = gelu(layer.experts.up_proj[expert] @ token)
            row = row + weight * (layer.experts.down_proj[expert] @ hidden)
        rows.append(row)
    return torch.stack(rows).view_as(x)


# The grouped product has no float64 kernel.
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("normalize_weights", [True, False], ids=["renormalised", "raw"])
@pytest.mark.parametrize("hidden", [8, 545, 1])
@pytest.mark.parametrize(
    ("impl", "dtype", "tolerance"),
    [(kernel, torch.float64, 1e-12) for kernel in ("eager", "batched_mm", "auto")]
    + [("grouped_mm", torch.float32, 1e-5)],
)
def test_equals_literal_loop(
    impl, dtype, tolerance, hidden, normalize_weights, gated, literal_choice, equal_with_gradients
):
    layer = make(hidden, impl, normalize_weights=normalize_weights, gated=gated, dtype=dtype).eval()
    x = torch.randn(2, 7, 8, dtype=dtype)
    equal_with_gradients(layer, lambda x: literal_loop(layer, literal_choice, x), layer.parameters(), x, tolerance)


@pytest.mark.parametrize("shared_experts", [1, 3])
def test_shared_experts_are_one_layer_beside(shared_experts, literal_choice, equal_with_gradients):
    layer = make(8, "eager", shared_experts=shared_experts, dtype=torch.float64).eval()
    assert layer.shared.up.weight.shape == (shared_experts * 8, 8)

    def reference(x):
        return (
            literal_loop(layer, literal_choice, x) + gelu(x @ layer.shared.up.weight.t()) @ layer.shared.down.weight.t()
        )

    equal_with_gradients(layer, reference, layer.parameters(), torch.randn(2, 7, 8, dtype=torch.float64), 1e-12)


def test_shared_experts_are_gated_if_the_others_are(literal_choice, equal_with_gradients):
    layer = make(3, "eager", shared_experts=2, gated=True).eval()
    assert sum(p.numel() for p in layer.shared.parameters()) == 3 * 8 * 3 * 2
    routed = make(3, "eager", gated=True).eval()
    routed.load_state_dict(layer.state_dict(), strict=False)

    def reference(x):
        hidden = silu(x @ layer.shared.gate.weight.t()) * (x @ layer.shared.up.weight.t())
        return literal_loop(layer, literal_choice, x) + hidden @ layer.shared.down.weight.t()

    equal_with_gradients(layer, reference, layer.parameters(), torch.randn(2, 7, 8, dtype=torch.float64), 1e-12)


# Largest error relative to the largest entry, measured (1.1e-6, 9e-3) times two.
@pytest.mark.parametrize("in_features", [8, 6, 5])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2.2e-6), (torch.bfloat16, 1.8e-2)])
@pytest.mark.parametrize("impl", KERNELS)
def test_low_precision_against_float64(impl, dtype, tolerance, in_features):
    layer, precise = make(545, impl, in_features, dtype=dtype), make(545, "eager", in_features)
    precise.load_state_dict(layer.state_dict())
    x = torch.randn(64, in_features, dtype=dtype)
    actual, expected = layer(x), precise(x.double())
    assert actual.dtype == dtype
    assert (actual.double() - expected).abs().max() <= tolerance * expected.abs().max()


@pytest.mark.parametrize("impl", KERNELS)
def test_zero_tokens(impl):
    layer = make(impl=impl, dtype=torch.float32)
    y = layer(torch.zeros(3, 0, 8))
    assert y.shape == (3, 0, 8)
    (y.sum() + regularization(layer).total).backward()
    assert all(p.grad is not None and not p.grad.any() for p in layer.parameters())


@pytest.mark.parametrize("impl", KERNELS)
def test_rows_that_are_not_finite_stay_nan_and_only_those(impl):
    layer, x = make(impl=impl, dtype=torch.float32), torch.randn(6, 8)
    x[1, 3], x[4, 0], x[5, 5] = torch.nan, torch.inf, -torch.inf
    y = layer(x)
    assert y.isnan().any(1).tolist() == [False, True, False, False, True, True]
    assert y[[1, 4, 5]].isnan().all()
    torch.testing.assert_close(y[[0, 2, 3]], layer(x[[0, 2, 3]]))


@pytest.mark.parametrize("impl", ["eager", "grouped_mm"])
def test_autocast(impl):
    layer = make(545, impl, dtype=torch.float32)
    x = torch.randn(16, 8)
    with torch.autocast("cpu", torch.bfloat16):
        low, from_low = layer(x), layer(x.bfloat16())
    assert low.dtype == torch.float32
    assert from_low.dtype == torch.bfloat16
    torch.testing.assert_close(low, layer(x), rtol=0.02, atol=0.02)


class TestRegularisers:
    @pytest.mark.parametrize("top_k", [1, 2, 5])
    def test_balance_is_top_k_when_uniform(self, top_k):
        layer = make(top_k=top_k)
        torch.nn.init.zeros_(layer.router.linear.weight)
        _y = layer(torch.randn(20, 8, dtype=torch.float64))
        assert regularization(layer).aux.item() == pytest.approx(top_k)

    def test_balance_is_the_number_of_experts_when_collapsed(self):
        layer = make(num_experts=5, top_k=1)
        with torch.no_grad():
            layer.router.linear.weight.zero_()[3] = 1e3
        _y = layer(torch.rand(20, 8, dtype=torch.float64) + 1)
        assert regularization(layer).aux.item() == pytest.approx(5)

    def test_total_and_its_gradient(self):
        layer, x = make(aux_weight=0.3, z_weight=0.2), torch.randn(20, 8, dtype=torch.float64)
        _y = layer(x)
        collected = regularization(layer)
        weight = layer.router.linear.weight
        logits = x @ weight.T
        probabilities = logits.softmax(-1)
        load = torch.bincount(probabilities.topk(2).indices.flatten(), minlength=5).double() / len(x)
        aux, z = 5 * (probabilities.mean(0) * load).sum(), logits.logsumexp(-1).square().mean()
        torch.testing.assert_close([collected.aux, collected.z], [aux.detach(), z.detach()])
        actual, expected = (torch.autograd.grad(t, weight)[0] for t in (collected.total, 0.3 * aux + 0.2 * z))
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-14)

    def test_padding_does_not_count(self):
        layer, x = make(), torch.randn(2, 6, 8, dtype=torch.float64)
        mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]])
        _y = layer(x, mask)
        masked = regularization(layer)
        _y = layer(x[mask.bool()])
        torch.testing.assert_close(masked.total, regularization(layer).total, rtol=1e-12, atol=0)

    def test_nothing_is_kept_in_evaluation(self):
        layer = make().eval()
        layer(torch.randn(3, 8, dtype=torch.float64))
        assert layer.statistics_log.take() == []


class TestBias:
    """``balancing="bias"``, of five experts of which tokens like the first most."""

    @staticmethod
    def make(**options):
        layer = make(balancing="bias", **options)
        with torch.no_grad():
            layer.router.linear.weight.mul_(0.1)[0] += 0.5
        return layer

    @staticmethod
    def tokens(count=40):
        return torch.randn(count, 8, dtype=torch.float64) + 1

    def test_selects_by_it_and_weighs_without(self):
        layer, x = self.make(bias_rate=0.25, normalize_weights=False).eval(), self.tokens()
        layer.router.moves.copy_(torch.tensor([-3, 0, 1, 0, 2]))
        probabilities = (x @ layer.router.linear.weight.t()).softmax(-1)
        routing = layer.route(x)
        scores = probabilities + torch.tensor([-0.75, 0.0, 0.25, 0.0, 0.5])
        assert torch.equal(routing.indices, scores.topk(2).indices)
        torch.testing.assert_close(routing.coefficients, probabilities.gather(1, routing.indices))

    def test_moves_once_a_step_against_the_load_of_all_its_passes(self):
        layer = self.make(bias_rate=0.25, z_weight=0.0)
        optimizer = build_optimizer(layer, learning_rate=0.0, weight_decay=0.0)
        load, moves = torch.zeros(5, dtype=torch.int64), torch.zeros(5, dtype=torch.int64)
        for count in (40, 7, 1):
            x = self.tokens(count)
            mask = torch.arange(count) != 0
            chosen = layer.route(x).indices
            assert torch.equal(chosen, layer.eval().route(x).indices)
            layer.train()(x, mask).sum().backward()
            load += torch.bincount(chosen[mask].flatten(), minlength=5)
            assert not layer.router.moves.any()
        optimizer.step()
        moves += torch.tensor([((total := sum(load.tolist())) > 5 * n) - (total < 5 * n) for n in load.tolist()])
        assert layer.router.moves.tolist() == moves.tolist() != [0] * 5
        # Without tokens, none moves.
        optimizer.step()
        assert torch.equal(layer.router.moves, moves)

    def test_passes_without_gradients_do_not_count(self):
        layer = self.make()
        with torch.no_grad():
            layer(self.tokens())
        layer.eval()(self.tokens())
        assert not layer.router.load.any()

    def test_balances(self):
        layer, x = self.make(bias_rate=0.002), self.tokens(400)
        with torch.no_grad():
            layer.router.linear.weight[0] -= 0.4
        loads = []
        for _ in range(200):
            layer(x).sum()
            loads.append((layer.router.load.double() / 800).tolist())
            layer.after_step()
        assert max(loads[0]) > 0.4
        assert max(loads[-1]) < 0.27

    @pytest.mark.parametrize(("options", "aux"), [({}, 0.0), ({"aux_weight": 0.1}, 0.1), ({"balancing": "loss"}, 0.01)])
    def test_no_loss_acts_beside_it_unless_asked_for(self, options, aux):
        layer = make(**{"balancing": "bias", **options})
        assert (layer.regularizers.aux, layer.regularizers.z) == (aux, 1e-4)
        assert ("router.moves" in layer.state_dict()) == ("balancing" not in options)

    def test_survives_half_precision(self):
        layer = self.make(dtype=torch.float32)
        layer.router.moves.fill_(12345)
        assert layer.bfloat16().router.moves.tolist() == [12345] * 5
        assert layer(torch.randn(4, 8, dtype=torch.bfloat16)).isfinite().all()


def test_missing_transformers_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers.integrations.moe", None)
    with pytest.raises(ImportError, match=r"impl='grouped_mm' needs transformers >= 5.*torchdsc\[models\]"):
        make(impl="grouped_mm", dtype=torch.float32)(torch.zeros(1, 8))
    make(impl="eager", dtype=torch.float32)(torch.zeros(1, 8))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"hidden": 0}, "hidden_features must be >= 1, got 0"),
        ({"in_features": 0}, "in_features must be >= 1, got 0"),
        ({"impl": "loop"}, "impl must be one of .*, got 'loop'"),
        ({"top_k": 6}, r"top_k must be in \[1, num_experts = 5\], got 6"),
        ({"aux_weight": -1.0}, "aux_weight must be finite and >= 0, got -1.0"),
        ({"z_weight": float("nan")}, "z_weight must be finite and >= 0"),
        ({"balancing": "none"}, "balancing must be one of .*, got 'none'"),
        ({"bias_rate": 0.0}, "bias_rate must be finite and > 0, got 0.0"),
        ({"shared_experts": -1}, "shared_experts must be >= 0, got -1"),
        ({"router_norm": "batch"}, "norm must be one of .*, got 'batch'"),
    ],
)
def test_errors(options, match):
    with pytest.raises(ValueError, match=match):
        make(**options)


def test_grouped_product_refuses_float64():
    with pytest.raises(ValueError, match="impl='grouped_mm' has no float64 kernel"):
        make(impl="grouped_mm")(torch.zeros(1, 8, dtype=torch.float64))


@pytest.mark.parametrize(
    ("x", "error", "match"),
    [
        (torch.zeros(2, 7, dtype=torch.float64), ValueError, "x must have shape"),
        (torch.zeros(2, 8), TypeError, "x must have the dtype of the parameters, torch.float64, got torch.float32"),
    ],
)
def test_wrong_input(x, error, match):
    with pytest.raises(error, match=match):
        make()(x)
