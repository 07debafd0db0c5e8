"""The public function :func:`compose`: checks its arguments and calls the operator of contract.py."""

from typing import Literal

import torch
from torch import Tensor

from torchdsc.ops.devices import several_devices

from .contract import run
from .crossover import IMPLEMENTATIONS

Implementation = Literal["auto", "reference", "gather", "dense", "triton"]


def compose(
    x: Tensor,
    u: Tensor,
    v: Tensor,
    indices: Tensor,
    coefficients: Tensor,
    *,
    eps: float | None = 1e-6,
    impl: Implementation = "auto",
) -> Tensor:
    """Apply the composed weight to each token: ``y = sum_k z_k (x . u_k) v_k``, equation (14).

    Here ``u_k`` and ``v_k`` are the selected rows divided by ``max(eps, |row|)``, equation (3). No normalised copy of
    the bank is kept, and no d_in x d_out matrix is formed.

    Args:
        x: Tokens of shape (..., d_in), any floating dtype.
        u: Input atoms of shape (M, d_in), dtype of ``x``.
        v: Output atoms of shape (M, d_out), dtype of ``x``.
        indices: Selected atoms of shape (..., K), int64, each in [0, M). An atom may occur twice.
        coefficients: Their coefficients z of shape (..., K), float32 (float64 where ``x`` is).
        eps: Lower bound of an atom's norm, > 0; None to use the atoms without normalisation.
        impl: "auto" chooses by measured crossovers; any other name is used as given, or refused. Exported programs
            (``torch.export``, ``torch.onnx.export``, from torch 2.7 on) contain the tensor operations of "reference".

    Returns:
        Tensor of shape (..., d_out) and the dtype of ``x``. Differentiable in ``x``, ``u``, ``v`` and
        ``coefficients``. Sums accumulate in float32 (float64 for float64 input).

    Raises:
        ValueError: On a shape, index dtype, ``eps`` or ``impl`` other than the above, or tensors on several devices.
        TypeError: If ``x``, ``u`` and ``v`` do not share one floating dtype.
        ImportError: If ``impl`` is "triton" and triton is missing or does not import.
        RuntimeError: If ``impl`` is "triton" and ``x`` is on the CPU, unless TRITON_INTERPRET=1 was set before triton
            was first imported.
    """
    check_shapes(x, u, v, indices, coefficients)
    _check_dtypes(x, u, v, indices)
    if not (x.device == u.device == v.device == indices.device == coefficients.device):
        raise several_devices(x=x, u=u, v=v, indices=indices, coefficients=coefficients)
    if eps is not None and not eps > 0:
        raise ValueError(f"eps must be > 0 or None, got {eps}")
    if impl != "auto" and impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl must be one of {('auto', *IMPLEMENTATIONS)}, got {impl!r}")
    accumulated = x.dtype if x.dtype in (torch.float32, torch.float64) else torch.float32
    if coefficients.dtype != accumulated:
        coefficients = coefficients.to(accumulated)
    if x.dim() == 2:
        return run(x, u, v, indices, coefficients, eps, impl)
    top_k = indices.shape[-1]
    flat = x.reshape(-1, x.shape[-1]), u, v, indices.reshape(-1, top_k), coefficients.reshape(-1, top_k)
    return run(*flat, eps, impl).reshape(*x.shape[:-1], v.shape[-1])


def check_shapes(x: Tensor, u: Tensor, v: Tensor, indices: Tensor, coefficients: Tensor) -> None:
    """Refuse arguments of :func:`compose` whose shapes do not fit."""
    if x.dim() == 0 or u.dim() != 2 or x.shape[-1] != u.shape[1]:
        raise ValueError(f"x must have shape (..., d_in) and u (M, d_in), got {tuple(x.shape)} and {tuple(u.shape)}")
    if v.dim() != 2 or v.shape[0] != u.shape[0]:
        raise ValueError(f"v must have shape (M, d_out) with M = {u.shape[0]}, got {tuple(v.shape)}")
    if indices.dim() != x.dim() or indices.shape[:-1] != x.shape[:-1] or indices.shape[-1] < 1:
        raise ValueError(f"indices must have shape {(*x.shape[:-1], 'K')} with K >= 1, got {tuple(indices.shape)}")
    if coefficients.shape != indices.shape:
        raise ValueError(
            f"coefficients must have the shape of indices, {tuple(indices.shape)}, got {tuple(coefficients.shape)}"
        )


def _check_dtypes(x: Tensor, u: Tensor, v: Tensor, indices: Tensor) -> None:
    if not x.is_floating_point() or u.dtype != x.dtype or v.dtype != x.dtype:
        raise TypeError(f"x, u and v must share one floating dtype, got {x.dtype}, {u.dtype} and {v.dtype}")
    if indices.dtype != torch.int64:
        raise ValueError(f"indices must be int64, got {indices.dtype}")
