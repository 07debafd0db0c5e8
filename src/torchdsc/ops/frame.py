"""The frame potential of a set of atoms, one side of equation (11)."""

from typing import Any

import torch
from torch import Tensor


def frame_potential(rows: Tensor, eps: float = 1e-6) -> Tensor:
    """Frame potential of one set of atoms, half of equation (11): ``sum_{i != j} (u_i . u_j)^2`` over unit rows.

    It equals ``|U^T U|_F^2 - sum_i |u_i|^4``, also with ``U U^T``. The smaller of these Gram matrices is used, so that
    no M x M matrix is formed if M > d.

    Args:
        rows: Raw rows of shape (M, d).
        eps: Lower bound of a row's norm.

    Returns:
        Scalar, float32 (float64 for float64 rows).
    """
    with torch.autocast(rows.device.type, enabled=False):
        precise = rows.to(torch.promote_types(rows.dtype, torch.float32))
        # Compiled for dynamic sizes, a number of a module is a symbol, which no autograd function takes.
        least = precise.new_full((), eps) if torch.compiler.is_compiling() else eps
        potential: Tensor = _FramePotential.apply(precise, least)  # type: ignore[no-untyped-call]
        return potential


class _FramePotential(torch.autograd.Function):
    """``|U^T U|_F^2 - sum_i |u_i|^4`` for ``u_i = row_i / max(eps, |row_i|)``, in few passes over the rows.

    Its gradient in u_i is ``4 (U^T U - |u_i|^2) u_i``: one matrix product, where autograd would take two.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, eps: float | Tensor) -> Tensor:
        norms = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
        scale = norms.clamp_min(eps).reciprocal_()
        unit = rows * scale
        squares = (norms * scale).square_()
        gram = unit.t() @ unit if unit.shape[0] > unit.shape[1] else unit @ unit.t()
        ctx.save_for_backward(unit, gram, scale, squares, norms > eps)
        potential: Tensor = gram.square().sum() - squares.square().sum()
        return potential

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        unit, gram, scale, squares, divided = ctx.saved_tensors
        product = unit @ gram if unit.shape[0] > unit.shape[1] else gram @ unit
        # A row divided by its norm has no gradient along itself.
        along = torch.linalg.vecdot(product, unit).unsqueeze(1) - squares.square()
        product = torch.addcmul(product, unit, squares + along * divided, value=-1.0)
        return product * (scale * (4.0 * grads[0])), None
