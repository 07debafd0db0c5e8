"""Triton: one program per token gathers its rows, one per atom and block of features sums the atom's gradient.

There is no tokens x K x d tensor and no normalised copy of the bank. Beside its results, the forward pass needs no
memory, or T K weights if K exceeds a block; the backward pass needs four numbers per pair of token and atom, and the
order of the pairs by atom. Atom gradients are summed in that order, without atomics, and so are deterministic. The
pairs of an atom with many are first summed in cells of fixed length.
"""

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from torchdsc.ops.triton_runtime import device_of, power_of_two, require_triton

# Elements of a tile of gathered rows: as many as four warps hold in registers beside their sums.
_TILE = 4096
_BLOCK_K = 16
_BLOCK_P = 16
# Pairs in a cell.
_CELL = 128


def forward(
    x: Tensor, u: Tensor, v: Tensor, indices: Tensor, coefficients: Tensor, eps: float | None
) -> tuple[Tensor, Tensor]:
    """Equation (14): y (T, d_out) in the dtype of x and the latent values (T, K)."""
    kernels = _kernels(x)
    tokens, top_k = indices.shape
    y, latent = x.new_empty(tokens, v.shape[1]), torch.empty_like(coefficients)
    options = _token_options(u, v, top_k, eps)
    options["NORMS"], norms_u, norms_v = _norms(kernels, u, v, indices, coefficients.dtype, eps)
    # The weights of one block of K stay in registers; more go through memory.
    weights = latent if top_k <= options["BLOCK_K"] else coefficients.new_empty(tokens, top_k)
    with device_of(x):
        kernels.forward_kernel[(tokens,)](
            *_strided(x, u, v, indices, coefficients), norms_u, norms_v,
            *_strided(y, latent), weights, u.shape[1], v.shape[1], **options,
        )  # fmt: skip
    return y, latent


def backward(
    grad: Tensor,
    x: Tensor,
    u: Tensor,
    v: Tensor,
    indices: Tensor,
    coefficients: Tensor,
    latent: Tensor,
    eps: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, u, v and coefficients; those of the banks are dense."""
    kernels = _kernels(x)
    tokens, top_k = indices.shape
    dx, dcoefficients = torch.empty_like(x), torch.empty_like(coefficients)
    pairs = coefficients.new_empty(4, tokens, top_k).unbind()
    options = _token_options(u, v, top_k, eps)
    options["NORMS"], norms_u, norms_v = _norms(kernels, u, v, indices, coefficients.dtype, eps)
    with device_of(x):
        kernels.backward_kernel[(tokens,)](
            *_strided(grad, u, v, indices, coefficients, latent), norms_u, norms_v,
            *_strided(dx, dcoefficients), *pairs, u.shape[1], v.shape[1], **options,
        )  # fmt: skip
        ordered, order = _by_atom(indices, u.shape[0])
        offsets = torch.searchsorted(ordered, torch.arange(u.shape[0] + 1, dtype=ordered.dtype, device=u.device))
        segments = ordered, order, offsets, top_k, options["NORMS"]
        du = _atom_gradient(kernels, u, x, pairs[0], pairs[2], *segments)
        dv = _atom_gradient(kernels, v, grad, pairs[1], pairs[3], *segments)
    return dx, du, dv, dcoefficients


def _atom_gradient(
    kernels: ModuleType,
    bank: Tensor,
    tokens: Tensor,
    weights: Tensor,
    along: Tensor,
    ordered: Tensor,
    order: Tensor,
    offsets: Tensor,
    top_k: int,
    norms: int,
) -> Tensor:
    """``sum_(t,k -> j) (weights_tk tokens_t - along_tk bank_j)`` of shape (M, d) and the bank's dtype."""
    num_atoms, width = bank.shape
    block = min(power_of_two(width), _TILE // _BLOCK_P)
    options = {"K": top_k, "NORMS": norms, "CELL": _CELL, "BLOCK_P": _BLOCK_P, "BLOCK_D": block}
    blocks, num_cells = -(-width // block), order.numel() // _CELL
    out = torch.empty_like(bank)
    if out.numel() == 0:
        return out
    cells = weights.new_empty(num_cells, width)
    if num_cells:
        kernels.cells_kernel[(num_cells, blocks)](
            order, ordered, weights, along, *_strided(tokens, bank), cells, width, **options
        )
    kernels.atoms_kernel[(num_atoms, blocks)](
        order, offsets, weights, along, *_strided(tokens, bank), cells, *_strided(out), width, **options
    )
    return out


def _by_atom(indices: Tensor, num_atoms: int) -> tuple[Tensor, Tensor]:
    """The flattened indices in ascending order, and their pairs; in int32, as a radix sort takes time for each byte."""
    flat = indices.reshape(-1)
    return torch.sort(flat.to(torch.int32) if num_atoms < 2**31 else flat, stable=True)


def _kernels(x: Tensor) -> ModuleType:
    require_triton(x.device)
    from . import triton_kernels

    return triton_kernels


def _token_options(u: Tensor, v: Tensor, top_k: int, eps: float | None) -> dict[str, Any]:
    block = min(power_of_two(top_k), _BLOCK_K)
    block_in, block_out = (min(power_of_two(t.shape[1]), _TILE // max(4, block)) for t in (u, v))
    return {"K": top_k, "EPS": eps or 1.0, "BLOCK_K": block, "BLOCK_IN": block_in, "BLOCK_OUT": block_out}


def _norms(
    kernels: ModuleType, u: Tensor, v: Tensor, indices: Tensor, dtype: torch.dtype, eps: float | None
) -> tuple[int, Tensor | None, Tensor | None]:
    """Where kernels take norms from, and the norms of both sides of the bank, if it has no more atoms than pairs."""
    if eps is None:
        return kernels.RAW.value, None, None
    if indices.numel() < u.shape[0]:
        return kernels.FROM_ROWS.value, None, None
    norms_u, norms_v = (torch.linalg.vector_norm(t, dim=1, dtype=dtype) for t in (u, v))
    return kernels.FROM_BANK.value, norms_u, norms_v


def _strided(*tensors: Tensor) -> list[Any]:
    """Each tensor followed by its strides, as the kernels take them."""
    return [argument for tensor in tensors for argument in (tensor, *tensor.stride())]
