import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from torchdsc.ops import gate


def literal(row, clamp, eps, kind):
    """Equation (5) with Python floats."""
    scores = [math.log1p(math.exp(min(max(r, -clamp), clamp))) for r in row]
    strength = sum(scores)
    factor = {"sum": math.tanh(strength), "mean": math.tanh(strength / len(row)), "none": 1.0}[kind]
    return [a / (strength + eps) * factor for a in scores], strength


@pytest.mark.parametrize("kind", ["sum", "mean", "none"])
@pytest.mark.parametrize("clamp", [20.0, 3.0])
def test_equals_literal_loop(kind, clamp):
    logits = torch.randn(7, 4, dtype=torch.float64) * 12
    coefficients, strength = gate(logits, logit_clamp=clamp, eps=1e-6, kind=kind)
    for t, row in enumerate(logits.tolist()):
        expected, expected_strength = literal(row, clamp, 1e-6, kind)
        torch.testing.assert_close(coefficients[t], torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-14)
        assert math.isclose(strength[t].item(), expected_strength, rel_tol=1e-12)


def test_gradcheck():
    logits = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda r: gate(r), (logits,))


@pytest.mark.slow
@settings(max_examples=200, deadline=None)
@given(
    rows=st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=1, max_size=16),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    kind=st.sampled_from(["sum", "mean", "none"]),
)
def test_property_coefficients_sum_to_less_than_tanh(rows, dtype, kind):
    coefficients, strength = gate(torch.tensor([rows], dtype=dtype), kind=kind)
    slack = 1 + 8 * len(rows) * torch.finfo(dtype).eps
    bound = {"sum": torch.tanh(strength), "mean": torch.tanh(strength / len(rows)), "none": torch.ones(1)}[kind]
    assert (coefficients >= 0).all()
    assert (coefficients.sum(-1) <= bound * slack).all()


def test_strictly_below_where_representable():
    coefficients, strength = gate(torch.tensor([[0.1, -0.3]], dtype=torch.float64))
    assert coefficients.sum() < torch.tanh(strength) < 1


def test_coefficients_vanish_with_the_strength():
    sums = [gate(torch.full((1, 4), r, dtype=torch.float64)).coefficients.sum() for r in (-2.0, -5.0, -10.0, -20.0)]
    assert all(a > b for a, b in pairwise(sums))
    assert sums[-1] < 1e-8


def test_not_finite_rows_are_nan_and_only_those():
    logits = torch.randn(4, 3)
    logits[0, 1], logits[1, 0], logits[2, 2] = torch.inf, -torch.inf, torch.nan
    coefficients, strength = gate(logits)
    assert coefficients[:3].isnan().all()
    assert strength[:3].isnan().all()
    assert coefficients[3].isfinite().all()


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"logit_clamp": -1.0}, "logit_clamp must be > 0, got -1.0"),
        ({"eps": 0.0}, "eps must be > 0, got 0.0"),
        ({"kind": "max"}, "kind must be"),
    ],
)
def test_errors(change, match):
    with pytest.raises(ValueError, match=match):
        gate(torch.zeros(2, 3), **change)
