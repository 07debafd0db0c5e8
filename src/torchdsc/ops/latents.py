"""Latent values of the selected atoms, for layers that need them before the composition."""

from typing import Any

import torch
from torch import Tensor, library

from .compose.crossover import choose_implementation
from .compose.gather import row_gradients, sampled_product, weighted_rows
from .devices import several_devices
from .export import is_exporting


def latents(x: Tensor, u: Tensor, indices: Tensor) -> Tensor:
    """``x_t . u_k`` for the atoms that each token selects, with raw atoms.

    Args:
        x: Tokens of shape (T, d_in).
        u: Input atoms of shape (M, d_in), dtype of ``x``.
        indices: Selected atoms of shape (T, K), int64, each in [0, M).

    Returns:
        Tensor of shape (T, K), float32 (float64 for float64 input), in which sums accumulate. Differentiable in ``x``
        and ``u``.

    Raises:
        ValueError: If shapes do not fit, or the tensors are on several devices.
        IndexError: On a CPU, if an index is out of range.
    """
    if x.dim() != 2 or u.dim() != 2 or x.shape[1] != u.shape[1]:
        raise ValueError(f"x must have shape (T, d_in) and u (M, d_in), got {tuple(x.shape)} and {tuple(u.shape)}")
    if indices.dim() != 2 or indices.shape[0] != x.shape[0] or indices.dtype != torch.int64:
        raise ValueError(
            f"indices must be int64 of shape ({x.shape[0]}, K), got {indices.dtype} of {tuple(indices.shape)}"
        )
    if not (x.device == u.device == indices.device):
        raise several_devices(x=x, u=u, indices=indices)
    if is_exporting():
        dtype = _accumulated(x)
        return torch.einsum("td,tkd->tk", x.to(dtype), u[indices].to(dtype))
    found: Tensor = _latents_op(x, u, indices)
    return found


@library.custom_op("torchdsc::latents", mutates_args=())
def _latents_op(x: Tensor, u: Tensor, indices: Tensor) -> Tensor:
    dtype = _accumulated(x)
    if x.is_cpu and indices.numel() and not 0 <= int(indices.min()) <= int(indices.max()) < u.shape[0]:
        raise IndexError(f"indices must be in [0, {u.shape[0]}), the atoms that there are")
    with torch.autocast(x.device.type, enabled=False):
        if _is_dense(x, u, indices):
            return (x.to(dtype) @ u.to(dtype).t()).gather(1, indices)
        return sampled_product(x.to(dtype), u.to(dtype), indices)


@_latents_op.register_fake
def _(x: Tensor, u: Tensor, indices: Tensor) -> Tensor:
    return x.new_empty(indices.shape, dtype=_accumulated(x))


@library.custom_op("torchdsc::latents_backward", mutates_args=())
def _latents_backward_op(grad: Tensor, x: Tensor, u: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    dtype = _accumulated(x)
    if x.shape[0] == 0:
        return x.new_zeros(x.shape), u.new_zeros(u.shape)
    grad = grad.contiguous()
    with torch.autocast(x.device.type, enabled=False):
        if _is_dense(x, u, indices):
            scattered = grad.new_zeros(x.shape[0], u.shape[0]).scatter_add_(1, indices, grad)
            dx, du = scattered @ u.to(dtype), scattered.t() @ x.to(dtype)
        else:
            dx = weighted_rows(grad, u.to(dtype), indices)
            du = row_gradients(grad, x.to(dtype), indices, u.shape[0])
    return dx.to(x.dtype).contiguous(), du.to(u.dtype).contiguous()


@_latents_backward_op.register_fake
def _(grad: Tensor, x: Tensor, u: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), u.new_empty(u.shape)


def _accumulated(x: Tensor) -> torch.dtype:
    return x.dtype if x.dtype == torch.float64 else torch.float32


def _is_dense(x: Tensor, u: Tensor, indices: Tensor) -> bool:
    chosen = choose_implementation(x.shape[0], u.shape[0], indices.shape[1], x.shape[1], x.device.type)
    return chosen == "dense"


def _setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    dx, du = _latents_backward_op(grad, *ctx.saved_tensors)
    return dx, du, None


_latents_op.register_autograd(_backward, setup_context=_setup_context)
