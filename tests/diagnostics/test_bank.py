import math

import pytest
import torch

from torchdsc.diagnostics import coherence, effective_rank

# Three vectors of the plane at 120 degrees, of different lengths: a tight frame once divided by their norms.
MERCEDES = torch.tensor([[0.0, 3.0], [-math.sqrt(0.75), -0.5], [math.sqrt(3.0), -1.0]])


@pytest.mark.parametrize(
    ("rows", "rank", "rms"),
    [
        pytest.param(3.0 * torch.eye(5)[:3], 3.0, 0.0, id="orthogonal"),
        pytest.param(torch.ones(4, 6), 1.0, 1.0, id="all equal"),
        pytest.param(torch.tensor([[1.0, 2.0], [-2.0, -4.0]]), 1.0, 1.0, id="opposite"),
        pytest.param(MERCEDES, 2.0, 0.5, id="tight frame"),
        pytest.param(torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 5.0]]), None, math.sqrt(1 / 3), id="a pair and one"),
        pytest.param(torch.tensor([[0.0, 7.0]]), 1.0, 0.0, id="one row"),
    ],
)
def test_by_hand(rows, rank, rms):
    if rank is None:  # Shares 2/3 and 1/3 of the squared singular values.
        rank = math.exp(-(2 / 3) * math.log(2 / 3) - (1 / 3) * math.log(1 / 3))
    assert effective_rank(rows) == pytest.approx(rank, rel=1e-6)
    assert coherence(rows) == pytest.approx(rms, abs=1e-6)


@pytest.mark.parametrize("shape", [(40, 12), (12, 40), (7, 7)])
def test_coherence_is_the_literal_mean_over_pairs(shape):
    rows = torch.randn(shape)
    unit = torch.nn.functional.normalize(rows.double())
    pairs = [(unit[i] @ unit[j]).item() ** 2 for i in range(shape[0]) for j in range(shape[0]) if i != j]
    assert coherence(rows) == pytest.approx(math.sqrt(sum(pairs) / len(pairs)), rel=1e-9)


def test_lengths_and_precision_do_not_matter():
    rows = torch.randn(20, 8)
    scaled = rows * torch.logspace(-3, 3, 20).unsqueeze(1)
    assert effective_rank(scaled) == pytest.approx(effective_rank(rows), rel=1e-5)
    assert coherence(scaled) == pytest.approx(coherence(rows), rel=1e-5)
    assert effective_rank(rows.bfloat16()) == pytest.approx(effective_rank(rows), rel=1e-2)


def test_rows_of_zeros_count_for_nothing():
    rows = torch.cat([torch.eye(3), torch.zeros(5, 3)])
    assert effective_rank(rows) == pytest.approx(3.0)
    assert effective_rank(torch.zeros(4, 3)) == pytest.approx(1.0)
    assert coherence(rows) == 0.0
