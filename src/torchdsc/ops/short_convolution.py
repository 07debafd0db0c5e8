"""Tokens mixed with those before them: a causal depthwise convolution, compiled in one pass on a CPU."""

from typing import Any

import torch
from torch import Tensor, library

from .devices import several_devices
from .native import MOST_MIXED, address, module_for

__all__ = ["short_convolution"]


def short_convolution(
    x: Tensor, weight: Tensor, length: int, positions: Tensor | None = None, onto: Tensor | None = None
) -> Tensor:
    """``y_t = onto_t + sum_{i < w} weight_i * x_{t-i}``, with zeros before the first token.

    Args:
        x: Sequences of shape (..., T, d).
        weight: Shape (w, d); row i is of the token i places before.
        length: How many tokens at the end to return, at most T.
        positions: Places of the returned tokens in their sequences, broadcasting to (..., length): a token sees none
            further before it than its place.
        onto: What the mix is added to, of the shape of the result; nothing by default.

    Returns:
        Tensor of shape (..., length, d).

    Raises:
        ValueError: If the tensors are on several devices.
    """
    device = x.device
    if not (
        weight.device == device
        and (positions is None or positions.device == device)
        and (onto is None or onto.device == device)
    ):
        raise several_devices(x=x, weight=weight, positions=positions, onto=onto)
    if positions is None and length == x.shape[-2] and _can_be_compiled(x, weight, onto):
        mixed: Tensor = _mix_op(x, weight, onto) if torch.is_grad_enabled() else _mix(x, weight, onto)
        return mixed
    start = x.shape[-2] - length
    mixed = x.narrow(-2, start, length) * weight[0]
    for distance in range(1, min(weight.shape[0], x.shape[-2])):
        # The first tokens have none at this distance.
        first = max(0, start - distance)
        count = x.shape[-2] - distance - first
        earlier = x.narrow(-2, first, count)
        if positions is not None:
            earlier = earlier.masked_fill((positions[..., length - count :] < distance).unsqueeze(-1), 0.0)
        mixed.narrow(-2, length - count, count).addcmul_(earlier, weight[distance])
    return mixed if onto is None else onto + mixed


def _can_be_compiled(x: Tensor, weight: Tensor, onto: Tensor | None) -> bool:
    tensors = (x, weight) if onto is None else (x, weight, onto)
    fits = x.numel() > 0 and weight.shape[0] <= MOST_MIXED and all(t.dtype == torch.float32 for t in tensors)
    # A compiler makes one pass of the tensor operations by itself.
    return fits and not torch.compiler.is_compiling() and module_for(*tensors) is not None


def _sizes(x: Tensor, weight: Tensor) -> tuple[int, ...]:
    length, width = x.shape[-2:]
    return x.numel() // (length * width), length, width, weight.shape[0], torch.get_num_threads()


def _mix(x: Tensor, weight: Tensor, onto: Tensor | None) -> Tensor:
    native, y = module_for(x, weight, onto), torch.empty_like(x)
    assert native is not None
    native.short_convolution(*map(address, (x, weight, onto, y)), *_sizes(x, weight))
    return y


@library.custom_op("torchdsc::short_convolution", mutates_args=())
def _mix_op(x: Tensor, weight: Tensor, onto: Tensor | None) -> Tensor:
    return _mix(x, weight, onto)


@library.custom_op("torchdsc::short_convolution_backward", mutates_args=())
def _mix_backward_op(grad: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    # Autograd may hand on a gradient that is expanded.
    grad = grad.contiguous()
    native, dx, dweight = module_for(grad, x, weight), torch.empty_like(x), torch.empty_like(weight)
    assert native is not None
    native.short_convolution_backward(*map(address, (grad, x, weight, dx, dweight)), *_sizes(x, weight))
    return dx, dweight


@_mix_op.register_fake
def _(x: Tensor, weight: Tensor, onto: Tensor | None) -> Tensor:
    return torch.empty_like(x)


@_mix_backward_op.register_fake
def _(grad: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(weight)


def _setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None], output: Tensor) -> None:
    x, weight, onto = inputs
    ctx.save_for_backward(x, weight)
    ctx.has_onto = onto is not None


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    dx, dweight = _mix_backward_op(grad, *ctx.saved_tensors)
    return dx, dweight, grad if ctx.has_onto else None


_mix_op.register_autograd(_backward, setup_context=_setup_context)
