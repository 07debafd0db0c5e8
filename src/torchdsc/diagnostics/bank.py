"""Geometry of a set of atoms."""

import torch
from torch import Tensor

from torchdsc.losses import frame_potential


@torch.no_grad()
def effective_rank(rows: Tensor, eps: float = 1e-6) -> float:
    """Effective rank: ``exp`` of the entropy of the unit rows' squared singular values, scaled to sum to 1.

    Args:
        rows: Raw rows of shape (M, d).
        eps: Lower bound of a row's norm.

    Returns:
        A value between 1 and min(M, d), which is reached by a tight frame.
    """
    unit = torch.nn.functional.normalize(rows.double(), dim=1, eps=eps)
    share = torch.linalg.svdvals(unit).square()
    share = share / share.sum().clamp_min(torch.finfo(share.dtype).tiny)
    return float(torch.special.entr(share).sum().exp())


@torch.no_grad()
def coherence(rows: Tensor, eps: float = 1e-6) -> float:
    """Root mean square of the inner products of different unit rows; 0 if they are orthogonal.

    Args:
        rows: Raw rows of shape (M, d).
        eps: Lower bound of a row's norm.

    Returns:
        A value in [0, 1]; 0 with a single row.
    """
    pairs = rows.shape[0] * (rows.shape[0] - 1)
    return float((frame_potential(rows.double(), eps) / max(1, pairs)).clamp_min(0.0).sqrt())
