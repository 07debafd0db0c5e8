"""Geometry of a set of atoms."""

import torch
from torch import Tensor

from torchdsc.losses import frame_potential


@torch.no_grad()
def effective_rank(rows: Tensor, eps: float = 1e-6) -> float:
    """``exp`` of the entropy of the unit rows' normalised squared singular values: between 1 and min(M, d).

    Args:
        rows: Raw rows of shape (M, d).
        eps: Lower bound of a row's norm.

    Returns:
        The effective rank; min(M, d) for a tight frame.
    """
    unit = torch.nn.functional.normalize(rows.double(), dim=1, eps=eps)
    share = torch.linalg.svdvals(unit).square()
    share = share / share.sum().clamp_min(torch.finfo(share.dtype).tiny)
    return float(torch.special.entr(share).sum().exp())


@torch.no_grad()
def coherence(rows: Tensor, eps: float = 1e-6) -> float:
    """Root mean square inner product of two different unit rows, 0 for orthogonal ones.

    Args:
        rows: Raw rows of shape (M, d).
        eps: Lower bound of a row's norm.

    Returns:
        A value in [0, 1]; 0 with a single row.
    """
    pairs = rows.shape[0] * (rows.shape[0] - 1)
    return float((frame_potential(rows.double(), eps) / max(1, pairs)).clamp_min(0.0).sqrt())
