import pytest
import torch

from torchdsc import DSC
from torchdsc.nn import GatedFFN


def literal(layer, x, seen):
    if layer.norm.__class__ is torch.nn.LayerNorm:
        seen = (seen - seen.mean(-1, keepdim=True)) / (seen.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
    gate = seen @ layer.gate.weight.T
    return (gate / (1 + (-gate).exp()) * (x @ layer.up.weight.T)) @ layer.down.weight.T


@pytest.mark.parametrize("gate_norm", ["none", "layer"])
@pytest.mark.parametrize("own", [True, False], ids=["swiglu", "seen"])
def test_equals_the_formula(gate_norm, own, equal_with_gradients):
    layer = GatedFFN(5, 7, gate_norm=gate_norm, dtype=torch.float64)
    x, other = torch.randn(2, 2, 3, 5, dtype=torch.float64)
    equal_with_gradients(
        lambda x: layer(x, router_input=None if own else other),
        lambda x: literal(layer, x, x if own else other),
        layer.parameters(),
        x,
    )


def test_is_linear_in_x_where_the_gate_sees_another_input():
    """As DSC is, whose atoms its units are."""
    layer, dsc = GatedFFN(5, 7, dtype=torch.float64), DSC(5, num_atoms=9, top_k=9, dtype=torch.float64)
    x, other = torch.randn(2, 3, 5, dtype=torch.float64)
    for module in (layer, dsc):
        torch.testing.assert_close(module(3 * x, None, other), 3 * module(x, None, other))


def test_has_three_matrices_and_no_bias():
    assert sum(p.numel() for p in GatedFFN(384, 100, gate_norm="layer", device="meta").parameters()) == 3 * 384 * 100


@pytest.mark.parametrize("mask", [None, torch.tensor([True, False, True])])
def test_each_token_is_mapped_alone(mask):
    layer, x = GatedFFN(5, 7), torch.randn(3, 5)
    torch.testing.assert_close(layer(x, mask)[1], layer(x[1]))


@pytest.mark.parametrize(
    ("arguments", "options", "match"),
    [
        ((0, 4), {}, "in_features must be >= 1"),
        ((4, 0), {}, "hidden_features must be >= 1"),
        ((4, 4), {"gate_norm": "batch"}, "gate_norm must be one of .*, got 'batch'"),
    ],
)
def test_errors(arguments, options, match):
    with pytest.raises(ValueError, match=match):
        GatedFFN(*arguments, **options)


def test_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"router_input must have the shape of x, \(3, 5\), got \(2, 5\)"):
        GatedFFN(5, 7)(torch.zeros(3, 5), router_input=torch.zeros(2, 5))
