"""Every router in the layer, and banks whose gradients are row-sparse."""

import copy
import io

import pytest
import torch
from torch.nn import functional

from torchdsc import DSC, BasisBank, certified_spectral_bound, regularization, spectral_norm
from torchdsc.diagnostics import RoutingMonitor
from torchdsc.losses import frame_loss
from torchdsc.nn import LinearRouter, LowRankRouter, ProductKeyRouter

KINDS = {
    "linear": {"router": "linear"},
    "low_rank": {"router": "low_rank", "router_rank": 3},
    "product_key": {"router": "product_key", "router_rank": 4},
    "heads": {"router": "product_key", "router_heads": 2},
}


def make_layer(kind, in_features=8, out_features=6, **options):
    layer = DSC(in_features, out_features, **{"num_atoms": 25, "top_k": 4} | KINDS[kind] | options).double()
    for parameter in layer.router.parameters():
        torch.nn.init.normal_(parameter, std=0.7)
    return layer


def logits_of(layer, x):
    """All logits (T, heads, M) by the routers' equations, a loop for product keys."""
    router, tau = layer.router, layer.options.logit_clamp
    x = functional.layer_norm(x, x.shape[-1:])
    if isinstance(router, ProductKeyRouter):
        rows = []
        for token in x:
            for head in range(router.heads):
                query = router.query[head * router.rank : (head + 1) * router.rank] @ token
                left, right = (
                    (router.keys[head, side] @ half).clamp(-tau / 2, tau / 2)
                    for side, half in enumerate(query.chunk(2))
                )
                rows.append(torch.stack([a + b for a in left for b in right]))
        return torch.stack(rows).view(len(x), router.heads, -1)
    if isinstance(router, LowRankRouter):
        return (x @ router.down.t() @ router.weight.t()).unsqueeze(1)
    return (x @ router.weight.t()).unsqueeze(1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("training", [False, True])
def test_layer_and_regularisers_equal_their_equations(kind, training):
    layer = make_layer(kind).train(training)
    options = layer.options
    x = torch.randn(30, 8, dtype=torch.float64)
    logits = logits_of(layer, x)
    heads = logits.shape[1]
    scores, indices = functional.softplus(logits, threshold=100).topk(4 // heads, dim=-1)
    strength = scores.sum((1, 2))
    coefficients = scores / (strength + options.eps).view(-1, 1, 1) * strength.tanh().view(-1, 1, 1)
    u, v = layer.bank.unit(options.eps)
    latent = torch.einsum("td,thkd->thk", x, u[indices]) * coefficients
    expected = torch.einsum("thk,thko->to", latent, v[indices]) * layer.gamma
    y = layer(x)
    torch.testing.assert_close(y, expected, rtol=1e-11, atol=1e-13)
    with torch.no_grad():
        torch.testing.assert_close(layer.eval()(x), expected, rtol=1e-11, atol=1e-13)
    if training:
        terms = regularization(layer, frame_share=0)
        share = logits.softmax(-1).mean((0, 1))
        torch.testing.assert_close(terms.aux, 25 * share.square().sum())
        torch.testing.assert_close(terms.z, logits.logsumexp(-1).square().mean())
        torch.testing.assert_close(terms.budget, (1 - strength.mean()).clamp_min(0).square())
        assert all(p.grad is None for p in layer.router.parameters())
        terms.total.backward()
        assert all(p.grad.any() for p in layer.router.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_padding_does_not_count(kind):
    layer, x = make_layer(kind), torch.randn(20, 8, dtype=torch.float64)
    mask = torch.rand(20) > 0.4
    _y = layer(x, mask)
    masked = regularization(layer, frame_share=0).as_dict()
    _y = layer(x[mask])
    assert masked == pytest.approx(regularization(layer, frame_share=0).as_dict(), rel=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_bound_holds(kind):
    layer = make_layer(kind)
    torch.nn.init.normal_(layer.gamma)
    norms = spectral_norm(layer, torch.randn(50, 8, dtype=torch.float64) * 10)
    assert (norms <= certified_spectral_bound(layer) * (1 + 1e-12)).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("statistics", [False, True])
def test_hooks_see_the_selection_and_change_nothing(kind, statistics):
    layer, x = make_layer(kind).train(statistics), torch.randn(40, 8, dtype=torch.float64)
    expected, seen = layer(x), []
    with layer.router.register_forward_hook(lambda module, args, output: seen.append(output)):
        assert torch.equal(layer(x), expected)
    (selection,) = seen
    found = layer.route(x)
    assert torch.equal(selection.indices, found.indices)
    assert torch.equal(selection.logits, found.logits)
    assert (selection.log_normalizer.numel() > 0) == statistics


@pytest.mark.parametrize("kind", KINDS)
def test_z_loss_on_raw_logits(kind):
    layer = make_layer(kind, logit_clamp=0.5, z_loss_on_raw_logits=True, aux_weight=0.0)
    x = torch.randn(20, 8, dtype=torch.float64)
    _y = layer(x)
    unclamped = copy.deepcopy(layer)
    object.__setattr__(unclamped.options, "logit_clamp", 1e6)
    expected = logits_of(unclamped, x).logsumexp(-1).square().mean()
    torch.testing.assert_close(regularization(layer, frame_share=0).z, expected)


@pytest.mark.parametrize("width", [128, 384])
@pytest.mark.parametrize(
    "build",
    [
        lambda d: LinearRouter(d, 1600),
        lambda d: LowRankRouter(d, 1600, rank=32),
        lambda d: ProductKeyRouter(d, 1600, rank=64),
        lambda d: ProductKeyRouter(d, 1600, rank=32, heads=4),
    ],
)
def test_logits_start_with_the_linear_routers_spread(build, width):
    spreads = []
    for _ in range(10):
        scores = build(width)(torch.randn(100, width))
        if scores.dim() == 4:
            scores = scores[..., 0, :].unsqueeze(-1) + scores[..., 1, :].unsqueeze(-2)
        spreads.append(scores.std())
    torch.testing.assert_close(torch.stack(spreads).mean().item(), 0.02 * width**0.5, rtol=0.06, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_low_precision_and_autocast_route_in_float32(kind):
    layer = DSC(16, num_atoms=49, top_k=4, **KINDS[kind])
    x = torch.randn(60, 16)
    expected = layer.router(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(layer.router(x), expected)
        indices = layer.route(x).indices
    assert torch.equal(indices, layer.route(x).indices)
    low = copy.deepcopy(layer).to(torch.bfloat16)
    y = low(x.bfloat16())
    assert low.router(x.bfloat16()).dtype == torch.float32
    precise = copy.deepcopy(low).double()(x.bfloat16().double())
    assert (y.double() - precise).abs().max() < 2e-2 * precise.abs().max()


@pytest.mark.parametrize("kind", KINDS)
def test_state_meta_device_and_monitor(kind):
    layer = DSC(8, num_atoms=25, top_k=4, **KINDS[kind])
    buffer = io.BytesIO()
    torch.save(layer.state_dict(), buffer)
    buffer.seek(0)
    fresh = DSC(8, num_atoms=25, top_k=4, **KINDS[kind], device="meta").to_empty(device="cpu")
    fresh.reset_parameters()
    fresh.load_state_dict(torch.load(buffer, weights_only=True))
    x = torch.randn(50, 8)
    with RoutingMonitor(fresh) as monitor:
        assert torch.equal(fresh(x), layer(x))
    (counted,) = monitor.layers()
    routing = layer.route(x)
    assert counted.utilization == len(routing.indices.unique()) / 25
    assert counted.strength == pytest.approx(float(routing.strength.detach().mean()), rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["low_rank", "heads"])
def test_compiles_whole(kind):
    torch._dynamo.reset()
    layer = DSC(16, num_atoms=49, top_k=4, **KINDS[kind])

    def step(x):
        return layer(x).square().sum() + regularization(layer).total

    compiled = torch.compile(step, fullgraph=True)
    for tokens in (21, 33):
        x = torch.randn(tokens, 16)
        gradients = []
        for function in (step, compiled):
            layer.zero_grad()
            function(x).backward()
            gradients.append([p.grad.clone() for p in layer.parameters()])
        for a, e in zip(*gradients, strict=True):
            torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-5)


class TestSparseGradients:
    def pair(self, **options):
        settings = {"num_atoms": 100, "top_k": 4, "router": "product_key", "frame_samples": 100} | options
        sparse = DSC(8, **settings, sparse_gradients=True).double()
        dense = DSC(8, **settings).double()
        dense.load_state_dict(sparse.state_dict())
        return sparse, dense

    def test_equal_dense_ones_and_hold_selected_rows_alone(self):
        sparse, dense = self.pair()
        x = torch.randn(6, 8, dtype=torch.float64)
        used = sparse.route(x).indices.unique()
        for layer in (sparse, dense):
            y = layer(x)
            (y.square().sum() + regularization(layer, frame_share=0).total).backward()
        for (name, actual), expected in zip(sparse.named_parameters(), dense.parameters(), strict=True):
            if name.startswith("bank"):
                assert actual.grad.is_sparse
                assert torch.equal(actual.grad.coalesce().indices()[0], used)
                torch.testing.assert_close(actual.grad.to_dense(), expected.grad, rtol=1e-12, atol=1e-14)
            else:
                torch.testing.assert_close(actual.grad, expected.grad, rtol=1e-12, atol=1e-14)
        with torch.no_grad():
            assert torch.equal(sparse(x), dense(x))

    def test_frame_term_of_all_rows(self):
        sparse, dense = self.pair()
        for layer in (sparse, dense):
            frame_loss(layer.bank, samples=100).backward()
        torch.testing.assert_close(sparse.bank.u.grad.to_dense(), dense.bank.u.grad, rtol=1e-11, atol=1e-12)
        torch.testing.assert_close(frame_loss(dense.bank, samples=100), frame_loss(dense.bank))

    @pytest.mark.parametrize("normalized", [False, True])
    def test_frame_term_of_samples_is_unbiased_and_sparse(self, normalized):
        bank = BasisBank(40, 8, sparse_gradients=True).double()
        torch.nn.init.normal_(bank.u)
        torch.nn.init.normal_(bank.v)
        bank.u.data[:20] = bank.u.data[:1]
        draws = torch.stack([frame_loss(bank, samples=6, normalized=normalized).detach() for _ in range(3000)])
        error = draws.std() / len(draws) ** 0.5
        assert (draws.mean() - frame_loss(bank, normalized=normalized)).abs() < 4 * error
        frame_loss(bank, samples=6).backward()
        assert len(bank.u.grad.coalesce().indices()[0]) == 6

    def test_a_bank_is_shared_with_its_kind(self):
        bank = BasisBank(25, 8, sparse_gradients=True)
        with pytest.raises(ValueError, match="bank must have sparse_gradients = False, got True"):
            DSC(8, bank=bank, num_atoms=25, top_k=2)


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"router": "product_key", "num_atoms": 24}, ValueError, "num_atoms must be a square .* 16 or 25, got 24"),
        (
            {"router": "product_key", "router_rank": 3},
            ValueError,
            "^router_rank must be even and >= 2 for product keys, got 3",
        ),
        (
            {"router": "product_key", "router_heads": 3},
            ValueError,
            "top_k must be a multiple of router_heads = 3, got 4",
        ),
        ({"router": "product_key", "router_bias": True}, ValueError, "router_bias must be False"),
        ({"router": "product_key", "router_heads": 0}, ValueError, "router_heads must be >= 1, got 0"),
        ({"router": "low_rank", "router_rank": 0}, ValueError, "router_rank must be >= 1, got 0"),
        ({"router": "low_rank", "router_rank": 2.0}, TypeError, "router_rank must be an int"),
        (
            {"router": "low_rank", "router_heads": 2},
            ValueError,
            "router_heads must be 1 for router = 'low_rank', got 2",
        ),
        ({"router_rank": 4}, ValueError, "router_rank must be None for router = 'linear', got 4"),
        ({"frame_samples": 1}, ValueError, "frame_samples must be >= 2, got 1"),
        ({"sparse_gradients": True}, ValueError, "frame_samples must be given for sparse_gradients .*, got None"),
    ],
    ids=str,
)
def test_wrong_options(options, error, match):
    with pytest.raises(error, match=match):
        DSC(8, **{"num_atoms": 25, "top_k": 4} | options)


@pytest.mark.parametrize(
    ("router", "arguments", "match"),
    [
        (LowRankRouter, {"rank": 0}, "rank must be >= 1, got 0"),
        (ProductKeyRouter, {"rank": 4, "heads": 0}, "heads must be >= 1, got 0"),
        (ProductKeyRouter, {"rank": 0}, "^rank must be even"),
        (LinearRouter, {"norm": "rms"}, "norm must be one of"),
    ],
)
def test_wrong_arguments(router, arguments, match):
    with pytest.raises(ValueError, match=match):
        router(8, 25, **arguments)
