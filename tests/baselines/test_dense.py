import math

import pytest
import torch

from torchdsc.baselines import DenseFFN


def test_equals_the_formula(equal_with_gradients):
    layer = DenseFFN(5, 7, dtype=torch.float64)

    def literal(x):
        hidden = x @ layer.up.weight.T
        return hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2))) @ layer.down.weight.T

    equal_with_gradients(layer, literal, layer.parameters(), torch.randn(2, 3, 5, dtype=torch.float64))


def test_has_two_matrices_and_no_bias():
    layer = DenseFFN(384, 2611, device="meta")
    assert sum(p.numel() for p in layer.parameters()) == 2 * 384 * 2611


@pytest.mark.parametrize(
    ("sizes", "match"), [((0, 4), "in_features must be >= 1"), ((4, 0), "hidden_features must be >= 1")]
)
def test_errors(sizes, match):
    with pytest.raises(ValueError, match=match):
        DenseFFN(*sizes)
