"""The short convolution: a causal depthwise convolution over the last few tokens."""

from typing import Any

import torch
from torch import Tensor, library
from torch.nn import functional

from .devices import several_devices
from .native import MOST_TAPS, module_for

__all__ = ["short_convolution"]

# Up to so many output elements, waking other threads costs more than the work.
_FEW_NUMBERS = 1 << 15


def short_convolution(
    x: Tensor, weight: Tensor, length: int, positions: Tensor | None = None, onto: Tensor | None = None
) -> Tensor:
    """``y_t = onto_t + sum_{i < w} weight_i * x_{t-i}``, with zeros before the first token.

    Args:
        x: Sequences of shape (..., T, d).
        weight: Shape (w, d); row i belongs to the token i places before.
        length: How many tokens at the end to return, at most T.
        positions: Positions of the returned tokens in their sequences, broadcasting to (..., length). Tokens before
            position 0 are taken as zeros.
        onto: A tensor of the shape of the result that is added to it; by default none.

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
    if positions is None and _can_be_compiled(x, weight, onto):
        if not torch.is_grad_enabled():
            return _compiled(x, weight, length, onto)
        if length == x.shape[-2]:
            whole: Tensor = _short_convolution_op(x, weight, onto)
            return whole
    return _by_tensors(x, weight, length, positions, onto)


def _by_tensors(
    x: Tensor, weight: Tensor, length: int, positions: Tensor | None = None, onto: Tensor | None = None
) -> Tensor:
    start, past = x.shape[-2] - length, weight.shape[0] - 1
    y = x.narrow(-2, start, length) * weight[0]
    # With zeros in front no length is a case of its own, so that one exported program serves all.
    padded = functional.pad(x, (0, 0, past, 0))
    for distance in range(1, past + 1):
        earlier = padded.narrow(-2, start + past - distance, length)
        if positions is not None:
            earlier = earlier.masked_fill((positions < distance).unsqueeze(-1), 0.0)
        y.addcmul_(earlier, weight[distance])
    return y if onto is None else onto + y


def _can_be_compiled(x: Tensor, weight: Tensor, onto: Tensor | None) -> bool:
    tensors = (x, weight) if onto is None else (x, weight, onto)
    fits = x.numel() > 0 and weight.shape[0] <= MOST_TAPS and all(t.dtype == torch.float32 for t in tensors)
    # torch.compile fuses the tensor operations into one pass itself.
    return fits and not torch.compiler.is_compiling() and module_for(*tensors) is not None


def _compiled(x: Tensor, weight: Tensor, length: int, onto: Tensor | None) -> Tensor:
    native, (num_tokens, width) = module_for(x, weight, onto), x.shape[-2:]
    assert native is not None
    y = x.new_empty(*x.shape[:-2], length, width)
    native.short_convolution(
        x=x,
        weight=weight,
        onto=onto,
        y=y,
        sequences=x.numel() // (num_tokens * width),
        num_tokens=num_tokens,
        length=length,
        width=width,
        taps=weight.shape[0],
        threads=torch.get_num_threads() if y.numel() > _FEW_NUMBERS else 1,
    )
    return y


@library.custom_op("torchdsc::short_convolution", mutates_args=())
def _short_convolution_op(x: Tensor, weight: Tensor, onto: Tensor | None) -> Tensor:
    return _compiled(x, weight, x.shape[-2], onto)


@library.custom_op("torchdsc::short_convolution_backward", mutates_args=())
def _short_convolution_backward_op(grad: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    # Autograd may pass an expanded gradient.
    grad, (length, width) = grad.contiguous(), x.shape[-2:]
    native, dx, dweight = module_for(grad, x, weight), torch.empty_like(x), torch.empty_like(weight)
    assert native is not None
    native.short_convolution_backward(
        grad=grad,
        x=x,
        weight=weight,
        dx=dx,
        dweight=dweight,
        sequences=x.numel() // (length * width),
        length=length,
        width=width,
        taps=weight.shape[0],
        threads=torch.get_num_threads(),
    )
    return dx, dweight


@_short_convolution_op.register_fake
def _(x: Tensor, weight: Tensor, onto: Tensor | None) -> Tensor:
    return torch.empty_like(x)


@_short_convolution_backward_op.register_fake
def _(grad: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(weight)


def _setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None], output: Tensor) -> None:
    x, weight, onto = inputs
    ctx.save_for_backward(x, weight)
    ctx.has_onto = onto is not None


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    dx, dweight = _short_convolution_backward_op(grad, *ctx.saved_tensors)
    return dx, dweight, grad if ctx.has_onto else None


_short_convolution_op.register_autograd(_backward, setup_context=_setup_context)
