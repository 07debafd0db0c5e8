"""Certified bounds of the composed update, and measurements of what they bound."""

import torch
from torch import Tensor, nn

from .losses import frame_potential
from .nn import DSC

__all__ = ["certified_spectral_bound", "frame_excess", "spectral_norm", "welch_bound"]


def certified_spectral_bound(layer: DSC) -> float:
    """Bound on ``|dW|_2`` for every input: ``scale max_i |gamma_i|``, equations (7) and (8); of thin atoms that times
    ``|P|_2 |Q|_2``; at most ``max_update_norm``, where the layer has one.

    It holds up to rounding, a few units in the last place, also for ``gate="none"``, as coefficients never sum to more
    than 1. It bounds the update for a fixed routing. It is not a Lipschitz constant of the whole map, because the
    coefficients also depend on x, and the output jumps where the selection changes.

    Args:
        layer: The layer.

    Returns:
        The bound; 0 for a layer without output features.

    Raises:
        TypeError: If ``layer`` is no DSC, as the module around one.
    """
    check_layer(layer)
    bound = float(layer.output_scale.detach().abs().max())
    for projection in (layer.reduce, layer.expand):
        if projection is not None:
            bound *= float(torch.linalg.matrix_norm(projection.weight.detach().double(), ord=2))
    return bound


@torch.no_grad()
def spectral_norm(layer: DSC, x: Tensor, router_input: Tensor | None = None) -> Tensor:
    """True ``|dW(z(x))|_2`` of each token, from its rank-K factors.

    For ``dW = A^T B`` with K rows in A and B, this is the norm of the K x K matrix ``R_A R_B^T``, from the QR
    decompositions of A^T and B^T. No d_in x d_out matrix is formed, and small norms stay accurate.

    Args:
        layer: The layer.
        x: Tokens of shape (..., d_in).
        router_input: What the router sees instead of ``x``, see :meth:`torchdsc.nn.RoutedLayer.forward`.

    Returns:
        Tensor of shape (...), in the dtype of the coefficients.

    Raises:
        TypeError: If ``layer`` is no DSC.
    """
    check_layer(layer)
    return norm_of_factors(*layer.factors(x, router_input))


def norm_of_factors(left: Tensor, right: Tensor) -> Tensor:
    """``|A^T B|_2`` of factors A (..., K, d_in) and B (..., K, d_out), of shape (...)."""
    return spectrum_of_factors(left, right).amax(-1)


def spectrum_of_factors(left: Tensor, right: Tensor) -> Tensor:
    """Singular values of ``A^T B`` that may differ from 0, of shape (..., min(K, d_in, d_out)), descending."""
    r_left = torch.linalg.qr(left.mT, mode="r").R
    r_right = torch.linalg.qr(right.mT, mode="r").R
    values: Tensor = torch.linalg.svdvals(r_left @ r_right.mT)
    return values


def check_layer(layer: nn.Module) -> None:
    """Refuse what is no DSC, and name the one inside."""
    if not isinstance(layer, DSC):
        inside = getattr(layer, "dsc", None)
        hint = ": pass layer.dsc" if isinstance(inside, DSC) else ""
        raise TypeError(f"layer must be a DSC, got {type(layer).__name__}{hint}")


def welch_bound(num_atoms: int, num_features: int) -> float:
    """Smallest possible frame potential of M unit rows in d dimensions: ``max(0, M^2 / d - M)``.

    Args:
        num_atoms: M.
        num_features: d.

    Returns:
        The bound on one side (u or v) of equation (11).
    """
    return max(0.0, num_atoms * num_atoms / num_features - num_atoms)


@torch.no_grad()
def frame_excess(rows: Tensor, eps: float = 1e-6) -> float:
    """Frame potential of raw rows (M, d) minus its Welch bound: how far L_frame can still fall; >= 0 up to rounding."""
    return float(frame_potential(rows.double(), eps)) - welch_bound(*rows.shape)
