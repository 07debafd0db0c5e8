"""The public function :func:`route`: checks its arguments and chooses an implementation."""

from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from torchdsc.ops.devices import several_devices
from torchdsc.ops.select import Selection, select
from torchdsc.ops.triton_runtime import has_triton

from . import screened
from .contract import route_forward, route_op
from .triton import LARGEST_TOP_K

Implementation = Literal["auto", "chunks", "screened", "triton"]
# A constant, because torch.compile does not trace get_args.
_IMPLEMENTATIONS = get_args(Implementation)

# Up to so many bytes, logits are kept for the backward pass, which saves computing them again.
KEPT_BYTES = 1 << 28
# Up to so many bytes, they stay in cache without chunks.
_FEW_BYTES = 1 << 21


def route(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    top_k: int,
    logit_clamp: float = 20.0,
    token_mask: Tensor | None = None,
    statistics: bool = False,
    impl: Implementation = "auto",
) -> Selection:
    """Select each token's top-K atoms by the logits ``r = x weight^T + bias``.

    The result is that of :func:`select` for these logits. There are three implementations:

    * "chunks": logits are computed and selected from in chunks that stay in cache. They are kept for the backward pass
      up to 256 MiB; beyond that they are computed again there, so that no T x M tensor exists.
    * "screened": for inference on a CPU that multiplies bfloat16. Logits in bfloat16, with bounds on their errors, rule
      out atoms that cannot be among the top-K; the others are compared in float32. The selection is the same, at a
      third of the cost.
    * "triton": one kernel that does not write logits, for K up to 64; the backward pass computes them in chunks.

    Args:
        x: Router inputs of shape (T, d), float32 or float64.
        weight: Shape (M, d), dtype of ``x``.
        bias: Shape (M,), dtype of ``x``, or None.
        top_k: K, with 1 <= K <= M.
        logit_clamp: tau > 0; matters only to the statistics.
        token_mask: Optional bool of shape (T,); tokens that are False are left out of ``probability_sum``.
        statistics: Whether to fill ``log_normalizer`` and ``probability_sum``; they are empty otherwise.
        impl: "auto" is "screened" where that is faster, "triton" on a GPU if the logits are too many to be kept, and
            else "chunks". Any other name is used as given, or refused.

    Returns:
        The selection, with the statistics of equations (9) and (12) if asked for. All of it but ``indices`` is
        differentiable in ``x``, ``weight`` and ``bias``.

    Raises:
        ValueError: On another shape than the above, ``top_k`` outside [1, M], tensors on several devices, or an
            ``impl`` that cannot be used.
        TypeError: If dtypes differ.
        ImportError: If ``impl`` is "triton" and triton is missing or does not import.
        RuntimeError: If ``impl`` is "triton" and ``x`` is on the CPU, unless kernels are interpreted there.
    """
    _check(x, weight, bias, top_k, token_mask)
    if impl not in _IMPLEMENTATIONS:
        raise ValueError(f"impl must be one of {_IMPLEMENTATIONS}, got {impl!r}")
    arguments = x, weight, bias, top_k, logit_clamp, token_mask, statistics
    if torch.compiler.is_compiling() and impl == "auto":
        # torch.compile fuses the surrounding operations itself, and comparisons would specialise symbolic sizes.
        return _whole(*arguments)
    # A mode that counts or records operators must see one.
    is_seen = not torch.compiler.is_compiling() and is_in_torch_dispatch_mode()
    inference = not torch.is_grad_enabled() and not statistics and not is_seen
    if impl == "screened" or (impl == "auto" and inference and screened.pays(x, weight, bias, top_k)):
        if not inference or not screened.applies_to(x, weight, bias, top_k):
            raise ValueError(f"impl must be another than 'screened', which needs {screened.NEEDS}, got {impl!r}")
        found = screened.forward(x, weight, bias, top_k)
        if found is not None:
            empty = x.new_empty(0)
            return Selection(*found, empty, empty)
    num_bytes = x.shape[0] * weight.shape[0] * x.element_size()
    if impl == "auto" and inference and num_bytes <= _FEW_BYTES:
        return _whole(*arguments)
    weights = None if token_mask is None else token_mask.to(x.dtype)
    way = "triton" if impl == "triton" or (impl == "auto" and _wants_triton(x, top_k, num_bytes)) else "chunks"
    # Without statistics the backward pass needs no logits.
    keep = way == "chunks" and torch.is_grad_enabled() and statistics and num_bytes <= KEPT_BYTES
    run = route_op if torch.is_grad_enabled() or is_seen else route_forward
    return Selection(*run(x, weight, bias, weights, top_k, logit_clamp, statistics, keep, way)[:4])


def _wants_triton(x: Tensor, top_k: int, num_bytes: int) -> bool:
    return x.is_cuda and num_bytes > KEPT_BYTES and top_k <= LARGEST_TOP_K and x.dtype == torch.float32 and has_triton()


def _whole(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    top_k: int,
    logit_clamp: float,
    token_mask: Tensor | None,
    statistics: bool,
) -> Selection:
    logits = functional.linear(x, weight, bias)
    return select(logits, top_k, logit_clamp=logit_clamp, token_mask=token_mask, statistics=statistics)


def _check(x: Tensor, weight: Tensor, bias: Tensor | None, top_k: int, token_mask: Tensor | None) -> None:
    if x.dim() != 2 or weight.dim() != 2 or x.shape[1] != weight.shape[1]:
        raise ValueError(f"x must have shape (T, d) and weight (M, d), got {tuple(x.shape)} and {tuple(weight.shape)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must have shape ({weight.shape[0]},), got {tuple(bias.shape)}")
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.dtype != x.dtype:
            raise TypeError(f"{name} must have the dtype of x, {x.dtype}, got {tensor.dtype}")
    if not 1 <= top_k <= weight.shape[0]:
        raise ValueError(f"top_k must be in [1, num_atoms = {weight.shape[0]}], got {top_k}")
    if token_mask is not None and token_mask.shape != x.shape[:1]:
        raise ValueError(f"token_mask must have shape {tuple(x.shape[:1])}, got {tuple(token_mask.shape)}")
    device = x.device
    if not (
        weight.device == device
        and (bias is None or bias.device == device)
        and (token_mask is None or token_mask.device == device)
    ):
        raise several_devices(x=x, weight=weight, bias=bias, token_mask=token_mask)
