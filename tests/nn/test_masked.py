"""Tokens that do not count may hold anything: they leave no trace in regularisers or gradients."""

import pytest
import torch

from torchdsc import DSC, DSCFeedForward, regularization
from torchdsc.baselines import PEER, MixtureOfLoRAs, StandardMoE
from torchdsc.ops import route, select, select_product_key

WEIGHTS = {"aux_weight": 0.3, "z_weight": 0.2}
ALL_WEIGHTS = {**WEIGHTS, "budget_weight": 0.5, "budget": 40.0, "num_atoms": 16, "top_k": 4}
LAYERS = {
    "dsc": lambda: DSC(8, **ALL_WEIGHTS),
    "dsc, raw": lambda: DSC(8, z_loss_on_raw_logits=True, **ALL_WEIGHTS),
    "dsc, relu": lambda: DSC(8, activation="relu", impl="dense", **ALL_WEIGHTS),
    "dsc, basic": lambda: DSC.basic(8, impl="reference", **ALL_WEIGHTS),
    "dsc, low rank": lambda: DSC(8, router="low_rank", router_rank=2, impl="gather", **ALL_WEIGHTS),
    "dsc, product keys": lambda: DSC(8, router="product_key", router_heads=2, **ALL_WEIGHTS),
    "dsc, sparse": lambda: DSC(8, sparse_gradients=True, frame_samples=4, **ALL_WEIGHTS),
    "moe": lambda: StandardMoE(8, 6, 4, shared_experts=1, impl="eager", **WEIGHTS),
    "moe, batched": lambda: StandardMoE(8, 6, 4, impl="batched_mm", **WEIGHTS),
    "mixture": lambda: MixtureOfLoRAs(8, num_experts=4, rank=2, **WEIGHTS),
    "peer": lambda: PEER(8, num_experts=16, **WEIGHTS),
}


def gradients_of(layer, loss):
    layer.zero_grad()
    loss.backward()
    return {
        name: p.grad.to_dense() if p.grad.is_sparse else p.grad
        for name, p in layer.named_parameters()
        if p.grad is not None
    }


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("seen", ["x", "router_input"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", LAYERS)
def test_leave_no_trace(name, dtype, seen, value):
    layer, x, mask = LAYERS[name]().to(dtype), torch.randn(3, 7, 8, dtype=dtype), torch.rand(3, 7) < 0.6
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter)
    router_input = torch.randn_like(x)
    given = {"router_input": router_input} if seen == "router_input" else {}
    spoilt = {"x": x.clone(), **{key: tensor.clone() for key, tensor in given.items()}}
    # Some of those that do not count, in one feature or all.
    rows = ~mask & (torch.rand(3, 7) < 0.7)
    spoilt[seen][rows, 2] = value
    spoilt[seen][rows & (torch.rand(3, 7) < 0.5)] = value
    results = []
    for inputs in ({"x": x, **given}, spoilt):
        y = layer(**inputs, token_mask=mask)
        torch.manual_seed(0)
        terms = regularization(layer, frame_share=0)
        loss = y[mask].square().mean() + terms.total
        results.append((terms.as_dict(), y[mask].detach(), gradients_of(layer, loss)))
    (expected, kept, gradients), (actual, kept_now, gradients_now) = results
    assert all(torch.isfinite(torch.tensor(v)) for v in actual.values())
    assert actual == pytest.approx(expected, rel=1e-6)
    torch.testing.assert_close(kept_now, kept)
    # Sums over the same tokens, in another order where the rest go to other atoms.
    torch.testing.assert_close(gradients_now, gradients, rtol=1e-5, atol=1e-7)
    assert y[rows].isnan().all()


def test_masked_tokens_that_are_finite_come_out_as_without_a_mask():
    for make in LAYERS.values():
        layer, x = make(), torch.randn(9, 8)
        assert torch.equal(layer(x, torch.arange(9) < 4), layer(x))


@pytest.mark.parametrize("function", ["select", "route", "chunks kept", "product keys"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_operations(function, dtype):
    """float32 takes the compiled functions where they are there."""
    x, mask = torch.randn(40, 16, dtype=dtype), torch.rand(40) < 0.5
    weight = torch.randn(16, 16, dtype=dtype)

    def run(rows, counted):
        rows = rows.clone().requires_grad_()
        if function == "select":
            found = select(rows, 3, logit_clamp=1.5, token_mask=counted)
        elif function == "product keys":
            halves = rows.view(-1, 2, 2, 4)
            found = select_product_key(
                halves[:, 0], halves[:, 1], 4, logit_clamp=1.5, token_mask=counted, statistics=True
            )
        else:
            impl = "auto" if function == "route" else "chunks"
            found = route(rows, weight, top_k=3, logit_clamp=1.5, token_mask=counted, statistics=True, impl=impl)
        loss = (found.probability_sum * torch.linspace(-1, 1, 16, dtype=dtype)).sum()
        loss = loss + found.log_normalizer[mask if counted is not None else slice(None)].square().sum()
        return found, torch.autograd.grad(loss, rows)[0]

    spoilt = x.clone()
    spoilt[~mask] = torch.nan
    (expected, gradient), (actual, spoilt_gradient) = run(x[mask], None), run(spoilt, mask)
    torch.testing.assert_close(actual.probability_sum, expected.probability_sum)
    torch.testing.assert_close(actual.log_normalizer[mask], expected.log_normalizer)
    torch.testing.assert_close(spoilt_gradient[mask], gradient)
    if function == "select":
        assert not spoilt_gradient[~mask].any()


@pytest.mark.parametrize("layer", [DSC(8, num_atoms=9, top_k=2), DSCFeedForward(8, 6, num_atoms=40)])
def test_a_mask_of_floats_is_refused(layer):
    """Additive masks have 0 for tokens that count."""
    x = torch.randn(2, 5, 8)
    arguments = (x, x) if isinstance(layer, DSCFeedForward) else (x,)
    with pytest.raises(TypeError, match=r"token_mask must hold bools or integers, .* got torch.float32"):
        layer(*arguments, token_mask=torch.zeros(2, 5))
    layer(*arguments, token_mask=torch.ones(2, 5, dtype=torch.int64))
