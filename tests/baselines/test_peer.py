import pytest
import torch
from torch.nn.functional import gelu

from torchdsc import regularization
from torchdsc.baselines import PEER


def make(**options):
    settings = {"num_experts": 16, "top_k": 6, "heads": 2, "query_features": 4, "dtype": torch.float64, **options}
    layer = PEER(6, 5, **settings)
    torch.nn.init.normal_(layer.router.keys)
    return layer


def literal(layer, x):
    """Head by head, expert by expert: the best sums of all pairs of half scores."""
    side, each = layer.router.side, layer.top_k // layer.router.heads
    rows = []
    for token in x.reshape(-1, x.shape[-1]):
        seen = token
        if layer.router.norm.__class__ is torch.nn.LayerNorm:
            seen = (token - token.mean()) / (token.var(correction=0) + 1e-5).sqrt()
        row = torch.zeros(layer.out_features, dtype=x.dtype)
        for head, query in enumerate((layer.router.query @ seen).view(layer.router.heads, 2, -1)):
            left, right = (layer.router.keys[head, half] @ query[half] for half in (0, 1))
            scores = {i * side + j: left[i] + right[j] for i in range(side) for j in range(side)}
            best = sorted(scores, key=lambda expert: -scores[expert].item())[:each]
            weights = torch.stack([scores[expert] for expert in best]).softmax(dim=0)
            for expert, weight in zip(best, weights, strict=True):
                row = row + weight * gelu(layer.down[expert] @ token) * layer.up[expert]
        rows.append(row)
    return torch.stack(rows).view(*x.shape[:-1], layer.out_features)


@pytest.mark.parametrize(
    "options", [{}, {"heads": 1, "top_k": 1}, {"heads": 3, "query_features": 6}, {"router_norm": "none"}], ids=str
)
@pytest.mark.parametrize("impl", ["reference", "gather", "dense", "auto"])
def test_equals_literal_loop(impl, options, equal_with_gradients):
    layer = make(impl=impl, **options).eval()
    x = torch.randn(2, 7, 6, dtype=torch.float64)
    equal_with_gradients(layer, lambda x: literal(layer, x), layer.parameters(), x, 1e-10)


def test_published_form_has_no_regulariser_and_one_may_be_asked_for():
    x = torch.randn(9, 6, dtype=torch.float64)
    layer = make()
    _y = layer(x)
    assert len(layer.statistics_log) == 0
    layer = make(aux_weight=0.1)
    _y = layer(x)
    terms = regularization(layer)
    # 1 where all experts are as likely.
    assert float(terms.aux) >= 1 - 1e-9
    assert float(terms.total) == pytest.approx(0.1 * float(terms.aux))


def test_padding_does_not_count():
    layer, x = make(aux_weight=0.1, z_weight=0.1), torch.randn(4, 6, dtype=torch.float64)
    _y = layer(torch.cat([x, 100 * x]), token_mask=torch.arange(8) < 4)
    padded = regularization(layer).as_dict()
    _y = layer(x)
    assert padded == pytest.approx(regularization(layer).as_dict(), rel=1e-12)


@pytest.mark.parametrize("heads", [1, 2])
def test_one_expert_a_head_is_not_trained(heads):
    """Its weight would always be 1, and the queries get no gradient from the task."""
    layer, x = make(heads=heads, top_k=heads), torch.randn(9, 6, dtype=torch.float64)
    with pytest.raises(ValueError, match=f"top_k must be at least 2 a head to train, got {heads} for heads = {heads}"):
        layer(x)
    assert layer.eval()(x).isfinite().all()
    layer = make(heads=heads, top_k=2 * heads)
    layer(x).square().sum().backward()
    assert all(parameter.grad.any() for parameter in layer.router.parameters())


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"heads": 0}, "top_k must be a multiple of heads = 0, got 6"),
        ({"heads": 4}, "top_k must be a multiple of heads = 4, got 6"),
        ({"num_experts": 15}, "num_experts must be a square, for product keys, got 15"),
        ({"num_experts": 1}, "top_k must be at most heads x num_experts = 2, got 6"),
        ({"query_features": 3}, "query_features must be even and >= 2, got 3"),
        ({"z_weight": -1.0}, "z_weight must be finite and >= 0"),
    ],
)
def test_errors(options, match):
    with pytest.raises(ValueError, match=match):
        make(**options)
