"""What the benchmark counts are the bytes that a pass has to read."""

import pytest
import torch

from benchmarks.suite.traffic import read_bytes
from torchdsc import DSC
from torchdsc.ops import ngram_codes


def test_linear_router_and_selected_rows():
    layer = DSC.basic(6, 5, num_atoms=6, top_k=1)
    with torch.no_grad():
        layer.router.weight.copy_(torch.eye(6))
    # Tokens that select atoms 0, 0 and 3: two rows of 6 + 5 numbers.
    assert read_bytes(layer, torch.eye(6)[[0, 0, 3]]) == {"router_bytes": 4 * 36, "atom_bytes": 4 * 2 * 11}


@pytest.mark.parametrize("width", [8, 16])
def test_ngrams_read_no_router_and_at_most_k_rows(width):
    layer = DSC(width, num_atoms=4 * width, top_k=4, router="ngram").eval()
    found = read_bytes(layer, ngram_codes(torch.tensor([3]), (1, 2, 3, 4)))
    assert found["router_bytes"] == 0
    assert found["atom_bytes"] == 4 * 4 * 2 * width
