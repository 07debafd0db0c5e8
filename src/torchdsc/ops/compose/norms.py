"""Norms of atoms, by which implementations scale results instead of keeping a normalised copy of the bank."""

import torch
from torch import Tensor


def inverse_norms(rows: Tensor, eps: float) -> Tensor:
    """``1 / max(eps, |row|)`` of shape (M,), equation (3)."""
    norms: Tensor = torch.linalg.vector_norm(rows, dim=-1)
    return norms.clamp_min_(eps).reciprocal_()


def pair_scale(atoms: Tensor, indices: Tensor, eps: float | None) -> Tensor | None:
    """``1 / max(eps, |atom|)`` of each selected atom, of shape (T, K); None if atoms are not normalised."""
    if eps is None:
        return None
    if indices.numel() >= atoms.shape[0]:
        return inverse_norms(atoms, eps)[indices]
    return inverse_norms(atoms.index_select(0, indices.reshape(-1)), eps).view_as(indices)


def radial(common: Tensor, scale: Tensor | None, indices: Tensor, atoms: Tensor, eps: float) -> Tensor:
    """The part of the bank's gradient along its own rows, which has to be subtracted.

    With ``a = 1 / |row|`` and A the gradient of the unit row, the gradient of a raw row is ``a (A - (A . unit) unit)``.
    Here ``A . unit`` is the sum of ``common`` over the pairs of the atom. Rows with a norm below ``eps`` are divided by
    a constant, and nothing is subtracted.

    Returns:
        Tensor of shape (M, d) and the dtype of ``common``.
    """
    assert scale is not None
    shrink = torch.where(scale < 1.0 / eps, common * scale.square(), 0.0)
    per_atom = common.new_zeros(atoms.shape[0]).index_add_(0, indices.reshape(-1), shrink.reshape(-1))
    return per_atom.unsqueeze(1) * atoms
