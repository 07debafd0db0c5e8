import pytest
import torch

from torchdsc import Residual, regularization
from torchdsc.baselines import DenseFFN, MixtureOfLoRAs
from torchdsc.ops import compose

IMPLEMENTATIONS = ("reference", "gather", "dense", "auto")


def make(rank=3, num_experts=5, in_features=6, out_features=4, dtype=torch.float64, **options):
    layer = MixtureOfLoRAs(in_features, out_features, num_experts=num_experts, rank=rank, dtype=dtype, **options)
    torch.nn.init.normal_(layer.up)
    torch.nn.init.normal_(layer.router.linear.weight)
    return layer


@pytest.fixture
def x():
    return torch.randn(2, 7, 6, dtype=torch.float64)


@pytest.mark.parametrize("options", [{}, {"normalize_weights": False, "router_norm": "layer", "scale": 0.7}])
@pytest.mark.parametrize(("rank", "top_k"), [(1, 1), (3, 2), (2, 5)])
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_equals_literal_loop(impl, rank, top_k, options, x, literal_choice, equal_with_gradients):
    layer = make(rank, top_k=top_k, impl=impl, **options).eval()

    def literal_loop(x):
        rows = []
        for token in x.reshape(-1, 6):
            row = x.new_zeros(4)
            for expert, weight in literal_choice(layer.router, token):
                down, up = (p.view(5, rank, -1)[expert] for p in (layer.down, layer.up))
                row = row + weight * options.get("scale", 1.0) * (down @ token) @ up
            rows.append(row)
        return torch.stack(rows).view(2, 7, 4)

    equal_with_gradients(layer, literal_loop, layer.parameters(), x)


def test_rank_one_is_the_composition_of_raw_atoms(x):
    layer = make(rank=1, scale=0.5)
    choice = layer.router(x.reshape(-1, 6))
    expected = compose(x.reshape(-1, 6), layer.down, layer.up, choice.indices, 0.5 * choice.coefficients, eps=None)
    torch.testing.assert_close(layer(x), expected.view(2, 7, 4), rtol=1e-12, atol=1e-12)


def test_starts_as_the_zero_update(x):
    base = DenseFFN(6, 8, dtype=torch.float64)
    layer = Residual(base, MixtureOfLoRAs(6, num_experts=5, rank=3, dtype=torch.float64))
    assert torch.equal(layer.eval()(x), base(x))
    layer(x).sum().backward()
    assert layer.dsc.up.grad.any()
    assert not layer.dsc.down.grad.any()


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("tokens", [3, 100], ids=["few", "many"])
def test_rows_that_are_not_finite_stay_nan_and_only_those(tokens, impl):
    layer, x = make(impl=impl), torch.randn(tokens, 6, dtype=torch.float64)
    x[1, 3], x[2, 0] = torch.nan, torch.inf
    y = layer(x)
    assert y[1:3].isnan().all()
    assert y[:1].isfinite().all()
    assert y[3:].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_dtype_of_the_output_is_that_of_the_input(dtype):
    layer, x = make(dtype=dtype), torch.randn(8, 6, dtype=dtype)
    assert layer(x).dtype == dtype
    with torch.autocast("cpu", torch.bfloat16):
        assert make(dtype=torch.float32)(x).dtype == dtype


def test_zero_tokens():
    layer = make()
    y = layer(torch.zeros(0, 6, dtype=torch.float64))
    assert y.shape == (0, 4)
    (y.sum() + regularization(layer).total).backward()
    assert all(not p.grad.any() for p in layer.parameters())


def test_regularisers_are_those_of_its_router(x):
    layer = make(aux_weight=0.3, z_weight=0.2)
    _y = layer(x)
    collected = regularization(layer)
    logits = x.reshape(-1, 6) @ layer.router.linear.weight.T
    load = torch.bincount(logits.topk(2).indices.flatten(), minlength=5).double() / len(logits)
    aux, z = 5 * (logits.softmax(-1).mean(0) * load).sum(), logits.logsumexp(-1).square().mean()
    torch.testing.assert_close(collected.total, 0.3 * aux + 0.2 * z, rtol=1e-12, atol=0)
    assert collected.frame == 0
    assert collected.budget == 0


def test_reset_parameters_of_the_factors():
    layer = make()
    layer.reset_parameters()
    assert not layer.up.any()
    assert layer.down.abs().max() <= 6**-0.5


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"rank": 0}, "rank must be >= 1, got 0"),
        ({"in_features": 0}, "in_features must be >= 1, got 0"),
        ({"out_features": 0}, "out_features must be >= 1, got 0"),
        ({"top_k": 6}, r"top_k must be in \[1, num_experts = 5\], got 6"),
        ({"impl": "loop"}, "impl must be one of .*, got 'loop'"),
        ({"aux_weight": -1.0}, "aux_weight must be finite and >= 0, got -1.0"),
        ({"router_norm": "batch"}, "norm must be one of .*, got 'batch'"),
    ],
)
def test_errors(options, match):
    with pytest.raises(ValueError, match=match):
        make(**options)
