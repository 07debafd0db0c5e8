import pytest
import torch
from torch import library

from torchdsc.ops import latents


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("tokens", "atoms", "top_k"), [(7, 11, 3), (5, 3, 3), (4, 2, 6), (1, 9, 1), (0, 4, 2)])
def test_equals_the_gathered_products(tokens, atoms, top_k, dtype):
    x, u = torch.randn(tokens, 6).to(dtype), torch.randn(atoms, 6).to(dtype)
    indices = torch.randint(atoms, (tokens, top_k))
    found = latents(x, u, indices)
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(found, torch.einsum("td,tkd->tk", x.to(found.dtype), u.to(found.dtype)[indices]))


@pytest.mark.parametrize(
    ("tokens", "atoms", "top_k"), [(7, 11, 3), (5, 3, 3), (4, 2, 6), (1, 9, 1), (0, 4, 2), (700, 8, 6)]
)
def test_gradients(tokens, atoms, top_k):
    x = torch.randn(tokens, 6, dtype=torch.float64, requires_grad=True)
    u = torch.randn(atoms, 6, dtype=torch.float64, requires_grad=True)
    indices, grad = torch.randint(atoms, (tokens, top_k)), torch.randn(tokens, top_k, dtype=torch.float64)
    found = torch.autograd.grad(latents(x, u, indices), (x, u), grad)
    expected = torch.autograd.grad(torch.einsum("td,tkd->tk", x, u[indices]), (x, u), grad)
    torch.testing.assert_close(found, expected)


def test_autocast_stays_out():
    x, u = torch.randn(9, 6, requires_grad=True), torch.randn(5, 6, requires_grad=True)
    indices = torch.randint(5, (9, 2))
    with torch.autocast("cpu", torch.bfloat16):
        found = latents(x, u, indices)
    torch.testing.assert_close(found, torch.einsum("td,tkd->tk", x, u[indices]))


@pytest.mark.parametrize("tokens", [4, 0])
def test_operator(tokens):
    """Of any strides, too: what a compiled graph is told of the results has to be so."""
    x = torch.randn(6, tokens).t().requires_grad_()
    u = torch.randn(6, 5).t().requires_grad_()
    library.opcheck(torch.ops.torchdsc.latents.default, (x, u, torch.randint(5, (tokens, 2))))


@pytest.mark.parametrize(
    ("x", "indices", "error", "message"),
    [
        ((3, 5), torch.zeros(3, 2, dtype=torch.int64), ValueError, r"u \(M, d_in\), got \(3, 5\) and \(4, 6\)"),
        (
            (3, 6),
            torch.zeros(2, 2, dtype=torch.int64),
            ValueError,
            r"int64 of shape \(3, K\), got torch.int64 of \(2, 2\)",
        ),
        ((3, 6), torch.zeros(3, 2, dtype=torch.int32), ValueError, "got torch.int32"),
        ((3, 6), torch.full((3, 2), 4), IndexError, r"indices must be in \[0, 4\)"),
        ((3, 6), torch.full((3, 2), -1), IndexError, r"indices must be in \[0, 4\)"),
    ],
)
def test_errors(x, indices, error, message):
    with pytest.raises(error, match=message):
        latents(torch.randn(x), torch.randn(4, 6), indices)
