"""Routing as a value: made ahead of a layer, it gives the same outputs, regularisers and gradients."""

import pytest
import torch

from torchdsc import DSC, regularization
from torchdsc.baselines import PEER, MixtureOfLoRAs, StandardMoE
from torchdsc.losses import regularization_of
from torchdsc.nn import forget_statistics

WEIGHTS = {"aux_weight": 0.3, "z_weight": 0.2}
ALL_WEIGHTS = {**WEIGHTS, "budget_weight": 0.5, "budget": 40.0, "num_atoms": 16, "top_k": 4}
LAYERS = {
    "dsc": lambda: DSC(8, **ALL_WEIGHTS),
    "dsc, relu": lambda: DSC(8, activation="relu", z_loss_on_raw_logits=True, **ALL_WEIGHTS),
    "dsc, product keys": lambda: DSC(8, router="product_key", router_heads=2, **ALL_WEIGHTS),
    "dsc, sparse": lambda: DSC(8, sparse_gradients=True, frame_samples=4, **ALL_WEIGHTS),
    "moe": lambda: StandardMoE(8, 6, 4, shared_experts=1, jitter=0.1, **WEIGHTS),
    "mixture_of_loras": lambda: MixtureOfLoRAs(8, num_experts=4, rank=2, **WEIGHTS),
    "peer": lambda: PEER(8, num_experts=16, **WEIGHTS),
}


@pytest.fixture(params=LAYERS)
def layer(request):
    made = LAYERS[request.param]()
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter)
    return made


def results(layer, call, mask, *leaves):
    """Output, regularisers and gradients of a call; noise and samples of L_frame are those of one seed."""
    torch.manual_seed(0)
    y = call()
    terms, counted = {}, y if mask is None else y[mask]
    loss = counted.square().mean()
    if layer.training:
        collected = regularization(layer)
        terms, loss = collected.as_dict(), loss + collected.total
    gradients = torch.autograd.grad(loss, [*leaves, *layer.parameters()], allow_unused=True)
    dense = [None if g is None else g.to_dense() if g.is_sparse else g for g in gradients]
    return y.detach(), terms, dense


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("elsewhere", [False, True])
@pytest.mark.parametrize("shape", [(6,), (2, 5), (2, 3, 2), (0,)], ids=str)
def test_routed_ahead_equals_one_call(layer, training, masked, elsewhere, shape):
    layer.train(training)
    x = torch.randn(*shape, 8, requires_grad=True)
    seen = torch.randn(*shape, 8, requires_grad=True) if elsewhere else None
    mask = torch.rand(shape) < 0.6 if masked else None
    if mask is not None and mask.numel():
        with torch.no_grad():
            mask.view(-1)[0], mask.view(-1)[-1] = True, False
            x[~mask] = torch.nan
            if seen is not None:
                # A token that is finite, and what the router sees of it is not.
                x.view(-1, 8)[-1], seen.view(-1, 8)[-1, 2] = 1.0, torch.inf
    leaves = [x] if seen is None else [x, seen]
    expected = results(layer, lambda: layer(x, mask, seen), mask, *leaves)

    def ahead():
        routing = layer.route(x if seen is None else seen, mask)
        assert routing.indices.shape == routing.coefficients.shape
        assert routing.indices.shape[:-1] == shape
        return layer(x, mask, routing=routing)

    actual = results(layer, ahead, mask, *leaves)
    # Zeros in place of a masked token that is not finite are summed with other atoms where its router sees more of it.
    exact = {"rtol": 0, "atol": 0} if seen is None or mask is None else {"rtol": 1e-5, "atol": 1e-7}
    torch.testing.assert_close(actual[0], expected[0], **exact, equal_nan=True)
    assert actual[1] == expected[1]
    # Evaluation keeps what is not finite.
    torch.testing.assert_close(actual[2], expected[2], **exact, equal_nan=not (training and x.numel()))
    if mask is not None and mask.numel():
        assert actual[0][~mask].isnan().all()
        assert actual[0][mask].isfinite().all()
        if training:
            assert all(gradient.isfinite().all() for gradient in actual[2] if gradient is not None)
            assert actual[1]["z"] > 0


def test_of_evaluation_is_refused_in_training(layer):
    x = torch.randn(4, 8)
    routing = layer.eval().route(x)
    assert routing.statistics is None
    with pytest.raises(ValueError, match="routing must be made in training mode for training, got one without"):
        layer.train()(x, routing=routing)
    assert torch.equal(layer.eval()(x, routing=routing), layer(x))


def test_wrong_arguments(layer):
    x = torch.randn(2, 3, 8)
    routing = layer.route(x)
    with pytest.raises(ValueError, match=r"routing must be of tokens of shape \(2, 2\), got \(2, 3\)"):
        layer(x[:, :2], routing=routing)
    with pytest.raises(ValueError, match=r"routing must be of tokens of shape \(6,\), got \(2, 3\)"):
        layer(x.view(6, 8), routing=routing)
    with pytest.raises(ValueError, match="router_input must be None where routing is given"):
        layer(x, router_input=x, routing=routing)
    with pytest.raises(ValueError, match=r"router_input must have shape \(..., in_features = 8\), got \(2, 3, 7\)"):
        layer.route(x[..., :7])
    with pytest.raises(ValueError, match=r"token_mask must have shape \(2, 3\), got \(3,\)"):
        layer.route(x, torch.ones(3))


def test_statistics_can_be_taken_out(layer):
    x = torch.randn(2, 3, 8)
    torch.manual_seed(0)
    y = layer(x)
    torch.manual_seed(0)
    expected = regularization(layer).as_dict()
    torch.manual_seed(0)
    routing, statistics = layer.route(x).take_statistics()
    assert statistics is not None
    assert statistics.num_tokens == 6
    assert routing.statistics is None
    again = layer(x, routing=routing)
    assert torch.equal(again, y)
    assert len(layer.statistics_log) == 0
    # Nothing of the layer's waits, so that a backward pass asks for nothing.
    again.sum().backward(retain_graph=True)
    with pytest.raises(ValueError, match="got no statistics"):
        regularization(layer)
    torch.manual_seed(0)
    assert regularization_of([(layer, statistics)]).as_dict() == expected
    layer.leave_statistics(statistics, again)
    torch.manual_seed(0)
    assert regularization(layer).as_dict() == expected


def test_each_call_leaves_the_statistics_of_the_routing_it_is_given(layer):
    x, other = torch.randn(2, 4, 8)
    routing = layer.route(x)
    assert len(layer.statistics_log) == 0
    kept = [layer(x, routing=routing), layer(other, routing=routing)]
    assert len(layer.statistics_log) == 2
    with pytest.raises(RuntimeError, match="not collected"):
        kept[1].sum().backward(retain_graph=True)
    forget_statistics(layer)
    del kept
    layer(x, routing=routing)
    assert len(layer.statistics_log) == 0


@pytest.mark.parametrize("name", ["dsc", "mixture_of_loras", "peer"])
def test_dtype_of_what_the_router_sees(name):
    layer, x = LAYERS[name](), torch.randn(4, 8)
    with pytest.raises(TypeError, match=r"router_input must have the dtype of the parameters, torch.float32, got"):
        layer.route(x.double())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = x.bfloat16()
        assert torch.equal(layer(low, routing=layer.route(low)), layer(low))
    forget_statistics(layer)
