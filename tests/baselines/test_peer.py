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
        queries = layer.router.query @ seen
        if (norm := layer.router.query_norm) is not None:
            queries = (queries - norm.running_mean) / (norm.running_variance + 1e-5).sqrt() * norm.weight + norm.bias
        for head, query in enumerate(queries.view(layer.router.heads, 2, -1)):
            left, right = (layer.router.keys[head, half] @ query[half] for half in (0, 1))
            scores = {i * side + j: left[i] + right[j] for i in range(side) for j in range(side)}
            best = sorted(scores, key=lambda expert: -scores[expert].item())[:each]
            weights = torch.stack([scores[expert] for expert in best]).softmax(dim=0)
            for expert, weight in zip(best, weights, strict=True):
                row = row + weight * gelu(layer.down[expert] @ token) * layer.up[expert]
        rows.append(row)
    return torch.stack(rows).view(*x.shape[:-1], layer.out_features)


@pytest.mark.parametrize(
    "options",
    [{}, {"heads": 1, "top_k": 1}, {"heads": 3, "query_features": 6}, {"router_norm": "none"}, {"query_norm": "batch"}],
    ids=str,
)
@pytest.mark.parametrize("impl", ["reference", "gather", "dense", "auto"])
def test_equals_literal_loop(impl, options, equal_with_gradients):
    layer = make(impl=impl, **options).eval()
    if layer.router.query_norm is not None:
        for statistics in layer.router.query_norm.state_dict().values():
            torch.nn.init.uniform_(statistics, 0.5, 1.5)
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


class TestQueryNorm:
    def test_in_training_is_batchnorm_of_the_features_of_queries(self):
        layer, x = make(query_norm="batch", router_norm="none"), torch.randn(9, 6, dtype=torch.float64)
        norm, known = layer.router.query_norm, torch.nn.BatchNorm1d(8, dtype=torch.float64)
        with torch.no_grad():
            for ours, theirs in ((norm.weight, known.weight), (norm.bias, known.bias)):
                torch.nn.init.uniform_(ours, 0.5, 1.5)
                theirs.copy_(ours)
        for training in (True, True, False):
            halves = known.train(training)(x @ layer.router.query.t()).view(9, 2, 2, 2)
            expected = torch.einsum("thsf,hsnf->thsn", halves, layer.router.keys)
            actual = layer.train(training).router(x)
            torch.testing.assert_close(actual, expected)
            for parameter in (layer.router.query, layer.router.keys):
                found = (
                    torch.autograd.grad(scores.sin().sum(), parameter, retain_graph=True)[0]
                    for scores in (actual, expected)
                )
                torch.testing.assert_close(*found)
        torch.testing.assert_close(norm.running_mean, known.running_mean)
        torch.testing.assert_close(norm.running_variance, known.running_var)

    def test_padding_counts_in_nothing(self):
        layer, x = make(query_norm="batch"), torch.randn(4, 6, dtype=torch.float64)
        padded = torch.cat([x, torch.full((2, 6), torch.nan, dtype=torch.float64), 100 * x])
        statistics = []
        for tokens, mask in ((padded, torch.arange(10) < 4), (x, None)):
            layer.router.reset_parameters()
            torch.manual_seed(0)
            torch.nn.init.normal_(layer.router.query)
            torch.nn.init.normal_(layer.router.keys)
            y = layer(tokens, mask)[:4]
            norm = layer.router.query_norm
            statistics.append((y.detach(), norm.running_mean.clone(), norm.running_variance.clone()))
        torch.testing.assert_close(*statistics)

    def test_a_pass_without_tokens_leaves_the_statistics(self):
        layer = make(query_norm="batch")
        layer(torch.zeros(0, 6, dtype=torch.float64))
        assert not layer.router.query_norm.running_mean.any()
        assert (layer.router.query_norm.running_variance == 1).all()

    def test_half_precision_and_autocast(self):
        layer = make(query_norm="batch", dtype=torch.float32)
        with torch.autocast("cpu", torch.bfloat16):
            assert layer(torch.randn(4, 6)).isfinite().all()
        assert layer.router.query_norm.running_mean.any()
        assert layer.bfloat16()(torch.randn(4, 6, dtype=torch.bfloat16)).isfinite().all()


@pytest.mark.parametrize(("init_std", "stds"), [(None, (200**-0.5, 100**-0.5)), (0.02, (0.02, 0.02))])
def test_initial_rows(init_std, stds):
    layer = PEER(200, 100, num_experts=256, init_std=init_std)
    for rows, std in zip((layer.down, layer.up), stds, strict=True):
        assert rows.std().item() == pytest.approx(std, rel=0.05)


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
        ({"query_norm": "layer"}, "query_norm must be one of .*, got 'layer'"),
        ({"init_std": 0.0}, "init_std must be finite and > 0, got 0.0"),
        ({"z_weight": -1.0}, "z_weight must be finite and >= 0"),
    ],
)
def test_errors(options, match):
    with pytest.raises(ValueError, match=match):
        make(**options)
