"""The terms of equation (13), a function each, (9) to (12)."""

from typing import Any

import torch
from torch import Tensor

from torchdsc.nn import BasisBank


def aux_loss(probability_sum: Tensor, num_tokens: Tensor | float, load: Tensor | None = None) -> Tensor:
    """Load balance, equation (9): ``L_aux = M sum_j P_j^2``, at least 1, and 1 when uniform.

    With ``load`` it is that of Mixture-of-Experts, ``N sum_j P_j f_j``, with f_j the share of tokens that select j:
    K when uniform.

    Args:
        probability_sum: Sum over tokens of the router's softmax, of shape (M,).
        num_tokens: Tokens summed over.
        load: Selections of each expert, of shape (M,).

    Returns:
        Scalar.
    """
    other = probability_sum if load is None else load
    return probability_sum.shape[0] * (probability_sum / num_tokens * (other / num_tokens)).sum()


def budget_loss(strength_sum: Tensor, num_tokens: Tensor | float, budget: float = 1.0) -> Tensor:
    """Activation budget, equation (10): ``L_budget = max(0, mu - mean S)^2``.

    Args:
        strength_sum: Sum over tokens of the signal strength S, scalar.
        num_tokens: Tokens summed over.
        budget: mu.

    Returns:
        Scalar.
    """
    return (budget - strength_sum / num_tokens).clamp_min(0.0).square()


def z_loss(squared_log_normalizer_sum: Tensor, num_tokens: Tensor | float) -> Tensor:
    """Router z-loss, equation (12): ``L_z = mean (logsumexp_j r_j)^2``.

    Args:
        squared_log_normalizer_sum: Sum over tokens of the squared ``logsumexp`` of the logits, scalar.
        num_tokens: Tokens summed over.

    Returns:
        Scalar.
    """
    return squared_log_normalizer_sum / num_tokens


def frame_potential(rows: Tensor, eps: float = 1e-6) -> Tensor:
    """Coherence of one set of atoms, half of equation (11): ``sum_{i != j} (u_i . u_j)^2`` over unit rows.

    It equals ``|U^T U|_F^2 - sum_i |u_i|^4``, or the same with ``U U^T``: the smaller Gram matrix is taken, so that
    no M x M matrix is formed where M > d.

    Args:
        rows: Raw rows of shape (M, d).
        eps: Lower bound of a row's norm.

    Returns:
        Scalar, float32 (float64 for float64 rows).
    """
    with torch.autocast(rows.device.type, enabled=False):
        precise = rows.to(torch.promote_types(rows.dtype, torch.float32))
        potential: Tensor = _FramePotential.apply(precise, eps)  # type: ignore[no-untyped-call]
        return potential


class _FramePotential(torch.autograd.Function):
    """``|U^T U|_F^2 - sum_i |u_i|^4`` of ``u_i = row_i / max(eps, |row_i|)``, in as few passes over the rows as can be.

    Its gradient in u_i is ``4 (U^T U - |u_i|^2) u_i``: one product, where autograd makes two.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, eps: float) -> Tensor:
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
        # Where the row was divided by its norm, what points along it is lost.
        along = torch.linalg.vecdot(product, unit).unsqueeze(1) - squares.square()
        product = torch.addcmul(product, unit, squares + along * divided, value=-1.0)
        return product * (scale * (4.0 * grads[0])), None


def frame_loss(bank: BasisBank, eps: float = 1e-6, *, normalized: bool = False, samples: int | None = None) -> Tensor:
    """Frame potential of both sides of a bank, equation (11).

    With ``samples`` it is estimated from that many rows, drawn without replacement, and unbiased: each pair of rows is
    as likely as any other.

    Args:
        bank: The bank.
        eps: Lower bound of a row's norm.
        normalized: Divide by the M (M - 1) pairs of a side: the mean squared coherence, which does not grow with M.
        samples: Rows to estimate it from, at least 2; all by default, and where M is no more.

    Returns:
        Scalar, differentiable in the bank's rows.
    """
    pairs, scale = bank.num_atoms * (bank.num_atoms - 1), 1.0
    u: Tensor = bank.u
    v: Tensor = bank.v
    if samples is not None and (samples < bank.num_atoms or bank.sparse_gradients):
        samples = min(samples, bank.num_atoms)
        drawn = torch.randperm(bank.num_atoms, device=u.device)[:samples]
        u, v, _ = bank.rows(drawn)
        if u is bank.u:
            u, v = u[drawn], v[drawn]
        scale = pairs / max(1, samples * (samples - 1))
    total = (frame_potential(u, eps) + frame_potential(v, eps)) * scale
    return total / max(1, pairs) if normalized else total
