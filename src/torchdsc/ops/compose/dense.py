"""Masked products over the whole bank: few large matrix products, faster if K is a large part of M."""

import torch
from torch import Tensor

from .norms import inverse_norms, pair_scale, radial


def forward(
    x: Tensor, u: Tensor, v: Tensor, indices: Tensor, coefficients: Tensor, eps: float | None
) -> tuple[Tensor, Tensor]:
    """Equation (14) as ``((x U^T) * Z) V`` with Z of shape (T, M), zero outside the selection."""
    accumulated = coefficients.dtype
    unit_u, unit_v = _unit(u.to(accumulated), eps), _unit(v.to(accumulated), eps)
    latent = (x.to(accumulated) @ unit_u.t()).gather(1, indices)
    return (_scatter(latent * coefficients, indices, u.shape[0]) @ unit_v).to(x.dtype), latent


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
    """Gradients of x, u, v and coefficients."""
    dtype, accumulated, num_atoms = x.dtype, coefficients.dtype, u.shape[0]
    u, v, x, grad = (t.to(accumulated) for t in (u, v, x, grad))
    unit_u, unit_v = _unit(u, eps), _unit(v, eps)
    projected = (grad @ unit_v.t()).gather(1, indices)
    weight_u = _scatter(coefficients * projected, indices, num_atoms)
    dx = weight_u @ unit_u
    du, dv = weight_u.t() @ x, _scatter(coefficients * latent, indices, num_atoms).t() @ grad
    if eps is not None:
        common = coefficients * projected * latent
        du = du * inverse_norms(u, eps).unsqueeze(1) - radial(common, pair_scale(u, indices, eps), indices, u, eps)
        dv = dv * inverse_norms(v, eps).unsqueeze(1) - radial(common, pair_scale(v, indices, eps), indices, v, eps)
    return dx.to(dtype), du.to(dtype), dv.to(dtype), latent * projected


def _unit(atoms: Tensor, eps: float | None) -> Tensor:
    return atoms if eps is None else atoms * inverse_norms(atoms, eps).unsqueeze(1)


def _scatter(values: Tensor, indices: Tensor, num_atoms: int) -> Tensor:
    return torch.zeros(values.shape[0], num_atoms, dtype=values.dtype, device=values.device).scatter_add_(
        1, indices, values
    )
