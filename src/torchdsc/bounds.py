"""Certified bounds of the composed update, and what they bound, measured."""

import torch
from torch import Tensor

from .losses import frame_potential
from .nn import DSC

__all__ = ["certified_spectral_bound", "frame_excess", "spectral_norm", "welch_bound"]


def certified_spectral_bound(layer: DSC) -> float:
    """Bound on ``|dW|_2`` for every input: ``scale max_i |gamma_i|``, equations (7) and (8).

    Strict in real arithmetic; in floating point it holds up to a few units in the last place, for ``gate="none"``
    too, since coefficients never sum to more than 1. It bounds the update with the routing held fixed. It is no
    Lipschitz constant of the whole map, which also moves through the coefficients and jumps where the selection does.

    Args:
        layer: The layer.

    Returns:
        The bound; 0 for a layer without output features.
    """
    return float(layer.output_scale.detach().abs().max())


@torch.no_grad()
def spectral_norm(layer: DSC, x: Tensor, router_input: Tensor | None = None) -> Tensor:
    """True ``|dW(z(x))|_2`` of each token, from its rank-K factors.

    With ``dW = A^T B``, A and B of K rows, it is the norm of the K x K matrix ``R_A R_B^T`` of their QR factors: no
    d_in x d_out matrix is formed, and no square root of rounding errors taken.

    Args:
        layer: The layer.
        x: Tokens of shape (..., d_in).
        router_input: What the router sees in place of ``x``, of its shape.

    Returns:
        Tensor of shape (...), in the dtype of the coefficients.
    """
    left, right = layer.factors(x, router_input)
    r_left = torch.linalg.qr(left.mT, mode="r").R
    r_right = torch.linalg.qr(right.mT, mode="r").R
    norm: Tensor = torch.linalg.matrix_norm(r_left @ r_right.mT, ord=2)
    return norm


def welch_bound(num_atoms: int, num_features: int) -> float:
    """Least frame potential of ``num_atoms`` unit rows in ``num_features`` dimensions: ``M^2 / d - M``, or 0.

    Args:
        num_atoms: M.
        num_features: d.

    Returns:
        The bound on one side's part of equation (11).
    """
    return max(0.0, num_atoms * num_atoms / num_features - num_atoms)


@torch.no_grad()
def frame_excess(rows: Tensor, eps: float = 1e-6) -> float:
    """Frame potential of raw rows (M, d) over its Welch bound: what L_frame could still lose, >= 0 up to rounding."""
    return float(frame_potential(rows.double(), eps)) - welch_bound(*rows.shape)
