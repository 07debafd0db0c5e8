"""Geometry of a set of atoms, and how far a step turns them."""

import math
from typing import Any

import torch
from torch import Tensor

from torchdsc.bounds import welch_bound
from torchdsc.losses import frame_potential
from torchdsc.nn import BasisBank
from torchdsc.nn.sharding import is_sharded

# Rows of a bank that a measurement takes its geometry from, and whose turn it follows.
_MOST_ROWS, _FOLLOWED_ROWS = 4096, 512


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
    return float(rank_of_spectrum(torch.linalg.svdvals(unit).square()))


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


def followed_atoms(bank: BasisBank) -> tuple[Tensor, Tensor]:
    """Evenly spaced unit atoms u and v, whose turn is followed."""
    return spaced_atoms(bank, _FOLLOWED_ROWS)


def measure_bank(bank: BasisBank, before: tuple[Tensor, Tensor] | None) -> dict[str, Any]:
    """The geometry of the atoms, and their turn since :func:`followed_atoms` returned ``before``."""
    found: dict[str, Any] = {}
    for side, rows in zip("uv", spaced_atoms(bank), strict=True):
        found[f"most_rank_{side}"] = min(rows.shape)
        found[f"effective_rank_{side}"], found[f"coherence_{side}"] = _geometry(rows)
        pairs = max(1, rows.shape[0] * (rows.shape[0] - 1))
        found[f"excess_{side}"] = found[f"coherence_{side}"] ** 2 - welch_bound(*rows.shape) / pairs
    if before is not None:
        # By the chord, as small angles are lost in a cosine.
        moves = [(now - was).norm(dim=1) for was, now in zip(before, followed_atoms(bank), strict=True)]
        chords = torch.maximum(*moves)
        angles = torch.rad2deg(2 * (chords[chords > 0] / 2).clamp_max(1.0).arcsin())
        found["turn"] = float(angles.median()) if angles.numel() else 0.0
    return found


@torch.no_grad()
def spaced_atoms(bank: BasisBank, most: int = _MOST_ROWS) -> tuple[Tensor, Tensor]:
    """Unit atoms u and v, all or so many: not drawn at random, as training draws from the same numbers."""
    device = next(bank.parameters()).device
    places = torch.linspace(0, bank.num_atoms - 1, min(most, bank.num_atoms), device=device).round().long()
    # A unit of FSDP cannot be called before the model around it; its parts are gathered without its hooks.
    read = bank.forward if any(map(is_sharded, bank.parameters())) else bank
    u, v = read(None, places)
    return u.float(), v.float()


def spectrum(unit: Tensor) -> Tensor | None:
    """Squared singular values of unit rows (M, d), ascending, min(M, d) of them; None if a row is not finite."""
    if not bool(unit.isfinite().all()):
        # LAPACK would raise.
        return None
    rows, features = unit.shape
    # The smaller of the two Gram matrices.
    values: Tensor = torch.linalg.eigvalsh(unit.mT @ unit if features < rows else unit @ unit.mT)
    return values.clamp_min(0.0)


def _geometry(unit: Tensor) -> tuple[float, float]:
    """Effective rank and coherence of unit rows (M, d); NaN if a row is."""
    values, rows = spectrum(unit), unit.shape[0]
    if values is None:
        return math.nan, math.nan
    # Squares of all inner products add up to those of the eigenvalues; rows with themselves give one each.
    others = values.square().sum() - unit.square().sum(1).square().sum()
    coherence = (others / max(1, rows * (rows - 1))).clamp_min(0.0).sqrt()
    return float(rank_of_spectrum(values)), float(coherence)


def rank_of_spectrum(squares: Tensor) -> Tensor:
    """Effective ranks of squared singular values (..., n): ``exp`` of the entropy of their shares, of shape (...)."""
    share = squares / squares.sum(-1, keepdim=True).clamp_min(torch.finfo(squares.dtype).tiny)
    ranks: Tensor = torch.special.entr(share).sum(-1).exp()
    return ranks
