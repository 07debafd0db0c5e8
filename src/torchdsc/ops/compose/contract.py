"""The operator ``torchdsc::compose``: its dispatch to an implementation, its fake and its gradients."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, library
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from torchdsc.ops.export import is_exporting

from . import dense, gather, reference, triton
from .crossover import choose_implementation

# An implementation is two functions of x (T, d_in), u (M, d_in), v (M, d_out), indices (T, K) and coefficients (T, K).
# forward returns y (T, d_out) and the latent values x . u_k (T, K), with unit u_k. backward also takes the gradient of
# y and the latent values, and returns the gradients of x, u, v and coefficients.
_FORWARD: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {
    "reference": reference.forward,
    "gather": gather.forward,
    "dense": dense.forward,
    "triton": triton.forward,
}
_BACKWARD: dict[str, Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]]] = {
    "reference": reference.backward,
    "gather": gather.backward,
    "dense": dense.backward,
    "triton": triton.backward,
}


def run(x: Tensor, u: Tensor, v: Tensor, indices: Tensor, coefficients: Tensor, eps: float | None, impl: str) -> Tensor:
    """Call the operator, or in plain inference the implementation, as dispatch costs more than a token's work."""
    is_direct = not torch.is_grad_enabled() and not torch.compiler.is_compiling() and type(x) is Tensor
    # A mode that counts or records operators must see one.
    if not is_direct or is_in_torch_dispatch_mode():
        if is_exporting():
            return reference.forward(x, u, v, indices, coefficients, eps)[0]
        y: Tensor = compose_op(x, u, v, indices, coefficients, eps, impl)[0]
        return y
    return _forward(x, u, v, indices, coefficients, eps, impl)[0]


def _forward(
    x: Tensor, u: Tensor, v: Tensor, indices: Tensor, coefficients: Tensor, eps: float | None, impl: str
) -> tuple[Tensor, Tensor]:
    if x.shape[0] == 0:
        return x.new_empty(0, v.shape[1]), torch.empty_like(coefficients)
    forward = _FORWARD[_resolve(impl, x, u, indices)]
    if not torch.is_autocast_enabled(x.device.type):
        return forward(x, u, v, indices, coefficients, eps)
    # Autocast would take products out of float32.
    with torch.autocast(x.device.type, enabled=False):
        return forward(x, u, v, indices, coefficients, eps)


@library.custom_op("torchdsc::compose", mutates_args=())
def compose_op(
    x: Tensor, u: Tensor, v: Tensor, indices: Tensor, coefficients: Tensor, eps: float | None, impl: str
) -> tuple[Tensor, Tensor]:
    """Run the chosen implementation; returns y (T, d_out) and the latent values x . u_k (T, K), contiguous."""
    y, latent = _forward(x, u, v, indices, coefficients, eps, impl)
    return y.contiguous(), latent.contiguous()


@compose_op.register_fake
def _(x: Tensor, u: Tensor, v: Tensor, indices: Tensor, coefficients: Tensor, *_: Any) -> tuple[Tensor, ...]:
    return x.new_empty(x.shape[0], v.shape[1]), coefficients.new_empty(coefficients.shape)


@library.custom_op("torchdsc::compose_backward", mutates_args=())
def compose_backward_op(
    grad: Tensor,
    x: Tensor,
    u: Tensor,
    v: Tensor,
    indices: Tensor,
    coefficients: Tensor,
    latent: Tensor,
    eps: float | None,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, u, v and coefficients, contiguous."""
    if x.shape[0] == 0:
        dx, du, dv, dcoefficients = (t.new_zeros(t.shape) for t in (x, u, v, coefficients))
        return dx, du, dv, dcoefficients
    backward = _BACKWARD[_resolve(impl, x, u, indices)]
    with torch.autocast(x.device.type, enabled=False):
        dx, du, dv, dcoefficients = backward(grad.contiguous(), x, u, v, indices, coefficients, latent, eps)
    return dx.contiguous(), du.contiguous(), dv.contiguous(), dcoefficients.contiguous()


@compose_backward_op.register_fake
def _(
    grad: Tensor, x: Tensor, u: Tensor, v: Tensor, indices: Tensor, coefficients: Tensor, *_: Any
) -> tuple[Tensor, ...]:
    return tuple(t.new_empty(t.shape) for t in (x, u, v, coefficients))


def _resolve(impl: str, x: Tensor, u: Tensor, indices: Tensor) -> str:
    if impl != "auto":
        return impl
    return choose_implementation(x.shape[0], u.shape[0], indices.shape[1], x.shape[1], x.device.type)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, u, v, indices, coefficients, ctx.eps, ctx.impl = inputs
    ctx.save_for_backward(x, u, v, indices, coefficients, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 7
    dx, du, dv, dcoefficients = compose_backward_op(grad, *ctx.saved_tensors, ctx.eps, ctx.impl)
    return dx, du, dv, None, dcoefficients, None, None


compose_op.register_autograd(_backward, setup_context=_setup_context)
