"""Work on the selected pairs of token and atom only; no tokens x K x d tensor is kept.

On a CPU, compiled functions read every selected row once (in the backward pass unless there are few pairs). Elsewhere
library kernels are used. They treat the selection as a sparse T x M matrix with K entries in each row. Latent values
are a sampled matrix product, outputs and input gradients weighted sums of bank rows (embedding_bag). Atom gradients are
the transposed sparse product, summed over segments of the pairs sorted by atom, which is deterministic on every device.
"""

import functools
import warnings
from types import ModuleType

import torch
from torch import Tensor

from torchdsc.ops.native import FEW_PAIRS, module_for

from .norms import inverse_norms, pair_scale, radial

# Bytes of gathered rows per chunk, if there is no sampled product; on a CPU about a core's L2 cache.
_CHUNK_BYTES = {"cpu": 1 << 20, "other": 1 << 28}
# The compiled backward pass takes the norms of all atoms, which pays from one pair per so many atoms.
_ATOMS_PER_PAIR = 8


def forward(
    x: Tensor, u: Tensor, v: Tensor, indices: Tensor, coefficients: Tensor, eps: float | None
) -> tuple[Tensor, Tensor]:
    """Equation (14): y (T, d_out) in the dtype of x and the latent values (T, K)."""
    native = module_for(x, u, v, indices, coefficients)
    if native is not None and x.dtype == torch.float32:
        return _forward_compiled(native, x, u, v, indices, coefficients, eps)
    return _forward_by_tensors(x, u, v, indices, coefficients, eps)


def _forward_by_tensors(
    x: Tensor, u: Tensor, v: Tensor, indices: Tensor, coefficients: Tensor, eps: float | None
) -> tuple[Tensor, Tensor]:
    if indices.numel() <= FEW_PAIRS:
        return _forward_few(x, u, v, indices, coefficients, eps)
    accumulated = coefficients.dtype
    u, u_indices = _in_dtype(u, indices, accumulated)
    v, v_indices = _in_dtype(v, indices, accumulated)
    latent = sampled_product(x.to(accumulated), u, u_indices)
    scale_u, scale_v = pair_scale(u, u_indices, eps), pair_scale(v, v_indices, eps)
    if scale_u is not None and scale_v is not None:
        latent.mul_(scale_u)
        coefficients = coefficients * scale_v
    return weighted_rows(latent * coefficients, v, v_indices).to(x.dtype), latent


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
    # Autograd may pass an expanded gradient.
    native = module_for(grad.contiguous() if grad.is_cpu else grad, x, u, v, indices, coefficients, latent)
    if native is not None and x.dtype == torch.float32 and _ATOMS_PER_PAIR * indices.numel() >= u.shape[0]:
        return _backward_compiled(native, grad.contiguous(), x, u, v, indices, coefficients, latent, eps)
    return _backward_by_tensors(grad, x, u, v, indices, coefficients, latent, eps)


def _backward_by_tensors(
    grad: Tensor,
    x: Tensor,
    u: Tensor,
    v: Tensor,
    indices: Tensor,
    coefficients: Tensor,
    latent: Tensor,
    eps: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype, accumulated = x.dtype, coefficients.dtype
    raw_u, raw_v = u, v
    u, u_indices = _in_dtype(u, indices, accumulated)
    v, v_indices = _in_dtype(v, indices, accumulated)
    x, grad = x.to(accumulated), grad.to(accumulated)
    scale_u, scale_v = pair_scale(u, u_indices, eps), pair_scale(v, v_indices, eps)
    projected = sampled_product(grad, v, v_indices)
    if scale_v is not None:
        projected.mul_(scale_v)
    weight_u, weight_v = coefficients * projected, coefficients * latent
    common = weight_u * latent
    if scale_u is not None and scale_v is not None:
        weight_u.mul_(scale_u)
        weight_v.mul_(scale_v)
    dx = weighted_rows(weight_u, u, u_indices)
    order, offsets = _segments(indices, raw_u.shape[0])
    du = _segment_sum(weight_u, x, order, offsets, indices.shape[1])
    dv = _segment_sum(weight_v, grad, order, offsets, indices.shape[1])
    if eps is not None:
        du -= radial(common, scale_u, indices, raw_u, eps)
        dv -= radial(common, scale_v, indices, raw_v, eps)
    return dx.to(dtype), du.to(dtype), dv.to(dtype), latent * projected


def _forward_compiled(
    native: ModuleType, x: Tensor, u: Tensor, v: Tensor, indices: Tensor, coefficients: Tensor, eps: float | None
) -> tuple[Tensor, Tensor]:
    (tokens, top_k), width = indices.shape, v.shape[1]
    y, latent = x.new_empty(tokens, width), torch.empty_like(coefficients)
    threads = 1 if indices.numel() <= FEW_PAIRS else torch.get_num_threads()
    # With fewer pairs than atoms, norms are computed for each pair instead.
    scale_u = scale_v = None
    if eps is not None and indices.numel() >= u.shape[0]:
        scale_u, scale_v = inverse_norms(u, eps), inverse_norms(v, eps)
    native.compose(
        x=x,
        u=u,
        v=v,
        coefficients=coefficients,
        scale_u=scale_u,
        scale_v=scale_v,
        indices=indices,
        y=y,
        latent=latent,
        tokens=tokens,
        top_k=top_k,
        d_in=u.shape[1],
        d_out=width,
        num_atoms=u.shape[0],
        threads=threads,
        eps=-1.0 if eps is None else eps,
    )
    return y, latent


def _backward_compiled(
    native: ModuleType,
    grad: Tensor,
    x: Tensor,
    u: Tensor,
    v: Tensor,
    indices: Tensor,
    coefficients: Tensor,
    latent: Tensor,
    eps: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    (tokens, top_k), num_atoms = indices.shape, u.shape[0]
    scale_u, scale_v = (None, None) if eps is None else (inverse_norms(u, eps), inverse_norms(v, eps))
    dx, du, dv, d_coefficients = (torch.empty_like(t) for t in (x, u, v, coefficients))
    native.compose_backward(
        grad=grad,
        x=x,
        u=u,
        v=v,
        coefficients=coefficients,
        latent=latent,
        scale_u=scale_u,
        scale_v=scale_v,
        indices=indices,
        dx=dx,
        du=du,
        dv=dv,
        d_coefficients=d_coefficients,
        weight_u=torch.empty_like(coefficients),
        weight_v=torch.empty_like(coefficients),
        common=torch.empty_like(coefficients),
        order=torch.empty_like(indices),
        ends=indices.new_empty(num_atoms),
        tokens=tokens,
        top_k=top_k,
        d_in=x.shape[1],
        d_out=v.shape[1],
        num_atoms=num_atoms,
        threads=torch.get_num_threads(),
        eps=-1.0 if eps is None else eps,
    )
    return dx, du, dv, d_coefficients


def _forward_few(
    x: Tensor, u: Tensor, v: Tensor, indices: Tensor, coefficients: Tensor, eps: float | None
) -> tuple[Tensor, Tensor]:
    # For few pairs the overhead of calls dominates, so there are as few as possible.
    tokens, top_k = indices.shape
    flat = indices.reshape(-1)
    rows_u, rows_v = u.index_select(0, flat), v.index_select(0, flat)
    dtype = coefficients.dtype
    if x.dtype != dtype:
        x, rows_u, rows_v = x.to(dtype), rows_u.to(dtype), rows_v.to(dtype)
    latent = rows_u @ x[0] if tokens == 1 else torch.bmm(rows_u.view(tokens, top_k, -1), x.unsqueeze(2)).view(-1)
    weights = coefficients.reshape(-1)
    if eps is not None:
        latent = latent / torch.linalg.vector_norm(rows_u, dim=1).clamp_min_(eps)
        weights = weights / torch.linalg.vector_norm(rows_v, dim=1).clamp_min_(eps)
    weights = weights * latent
    if tokens == 1:
        y = (weights @ rows_v).unsqueeze(0)
    else:
        y = torch.bmm(weights.view(tokens, 1, top_k), rows_v.view(tokens, top_k, -1)).squeeze(1)
    return y if y.dtype == u.dtype else y.to(u.dtype), latent.view(tokens, top_k)


def _in_dtype(atoms: Tensor, indices: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Atoms in the accumulation dtype, and indices into them: the bank, or the selected rows if those are fewer."""
    if atoms.dtype == dtype:
        return atoms, indices
    if indices.numel() >= atoms.shape[0]:
        return atoms.to(dtype), indices
    rows = atoms.index_select(0, indices.reshape(-1)).to(dtype)
    return rows, torch.arange(indices.numel(), device=indices.device).view_as(indices)


def sampled_product(x: Tensor, atoms: Tensor, indices: Tensor) -> Tensor:
    """``x_t . atoms_(t,k)`` of shape (T, K)."""
    tokens, top_k = indices.shape
    # The sampled product refuses patterns with more entries in a row than columns.
    if x.device.type == "cpu" and top_k <= atoms.shape[0] and _has_sampled_product():
        starts = torch.arange(0, tokens * top_k + 1, top_k)
        pattern = torch.sparse_csr_tensor(
            starts, indices.reshape(-1), x.new_zeros(tokens * top_k), (tokens, atoms.shape[0]), check_invariants=False
        )
        product: Tensor = torch.sparse.sampled_addmm(pattern, x, atoms.t(), beta=0.0)
        return product.values().view(tokens, top_k)
    out = x.new_empty(tokens, top_k)
    budget = _CHUNK_BYTES["cpu" if x.device.type == "cpu" else "other"]
    chunk = max(1, budget // (top_k * atoms.shape[1] * atoms.element_size()))
    for start in range(0, tokens, chunk):
        rows = atoms[indices[start : start + chunk]]
        torch.bmm(rows, x[start : start + chunk].unsqueeze(2), out=out[start : start + chunk].unsqueeze(2))
    return out


@functools.cache
def _has_sampled_product() -> bool:
    # Torch warns that CSR tensors are in beta, about which a user of this library can do nothing.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            pattern = torch.sparse_csr_tensor(torch.tensor([0, 1]), torch.tensor([0]), torch.zeros(1), (1, 1))
            torch.sparse.sampled_addmm(pattern, torch.ones(1, 1), torch.ones(1, 1), beta=0.0)
        except RuntimeError:
            return False
    return True


def weighted_rows(weights: Tensor, atoms: Tensor, indices: Tensor) -> Tensor:
    """``sum_k weights_tk atoms_(t,k)`` of shape (T, d)."""
    return torch.nn.functional.embedding_bag(indices, atoms, per_sample_weights=weights, mode="sum")


def row_gradients(weights: Tensor, tokens: Tensor, indices: Tensor, num_atoms: int) -> Tensor:
    """``sum_(t,k -> j) weights_tk tokens_t`` of shape (M, d), the gradient of rows of which a token takes K."""
    return _segment_sum(weights, tokens, *_segments(indices, num_atoms), indices.shape[1])


def _segments(indices: Tensor, num_atoms: int) -> tuple[Tensor, Tensor]:
    """The order of the pairs by atom (T K,), and where each atom's pairs start in it (M + 1,)."""
    ordered, order = torch.sort(indices.reshape(-1), stable=True)
    offsets = torch.searchsorted(ordered, torch.arange(num_atoms + 1, device=indices.device))
    return order, offsets


def _segment_sum(weights: Tensor, tokens: Tensor, order: Tensor, offsets: Tensor, top_k: int) -> Tensor:
    """Transposed sparse product ``sum_(t,k -> j) weights_tk tokens_t`` of shape (M, d)."""
    return torch.nn.functional.embedding_bag(
        order // top_k,
        tokens,
        offsets,
        per_sample_weights=weights.reshape(-1)[order],
        mode="sum",
        include_last_offset=True,
    )
