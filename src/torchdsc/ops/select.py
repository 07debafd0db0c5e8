"""Selection: the top-K of router logits, and the regularisers' statistics in the same pass."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, library

from .devices import several_devices
from .native import MOST_SELECTED, module_for, rows_of

# Logits per chunk, few enough to stay in cache between two readings.
_CHUNK = {"cpu": 1 << 19, "other": 1 << 28}
# Up to so many logits, waking other threads costs more than the work.
_FEW_LOGITS = 1 << 15


class Selection(NamedTuple):
    """The atoms selected from a router's logits (T, M).

    Attributes:
        logits: The K largest raw logits of each token, sorted, of shape (T, K).
        indices: Their atoms, int64 of shape (T, K).
        log_normalizer: ``logsumexp`` of each token's clamped logits, of shape (T,).
        probability_sum: Sum over counted tokens of ``softmax`` of the clamped logits, of shape (M,).
    """

    logits: Tensor
    indices: Tensor
    log_normalizer: Tensor
    probability_sum: Tensor


def select(
    logits: Tensor, top_k: int, *, logit_clamp: float, token_mask: Tensor | None = None, statistics: bool = True
) -> Selection:
    """Select each token's top-K atoms and compute the statistics for equations (9) and (12), in one pass.

    The top-K is that of raw logits, as clamp and softplus are monotone. Statistics are those of clamped logits.

    Args:
        logits: Router logits of shape (T, M), float32 or float64.
        top_k: K, with 1 <= K <= M.
        logit_clamp: tau > 0.
        token_mask: Optional bool of shape (T,); tokens that are False are left out of ``probability_sum``, whatever
            their logits are.
        statistics: Whether to fill ``log_normalizer`` and ``probability_sum``; they are empty otherwise.

    Returns:
        The selection; differentiable in ``logits`` through all but ``indices``.

    Raises:
        ValueError: If ``top_k`` is outside [1, M], or ``token_mask`` has another shape than (T,) or another device.
    """
    if not 1 <= top_k <= logits.shape[-1]:
        raise ValueError(f"top_k must be in [1, num_atoms = {logits.shape[-1]}], got {top_k}")
    if token_mask is not None and token_mask.shape != logits.shape[:1]:
        raise ValueError(f"token_mask must have shape {tuple(logits.shape[:1])}, got {tuple(token_mask.shape)}")
    if token_mask is not None and token_mask.device != logits.device:
        raise several_devices(logits=logits, token_mask=token_mask)
    if not statistics:
        differentiable = torch.is_grad_enabled() or torch.compiler.is_compiling()
        values, indices = logits.topk(top_k) if differentiable else largest(logits, top_k)
        empty = logits.new_empty(0)
        return Selection(values, indices, empty, empty)
    weights = None if token_mask is None else token_mask.to(logits.dtype)
    return Selection(*_select_op(logits, weights, top_k, logit_clamp))


@library.custom_op("torchdsc::select", mutates_args=())
def _select_op(
    logits: Tensor, weights: Tensor | None, top_k: int, logit_clamp: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return select_forward(logits, weights, top_k, logit_clamp)


def select_forward(
    logits: Tensor, weights: Tensor | None, top_k: int, logit_clamp: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The fields of :class:`Selection`, without gradients; ``weights`` (T,) weight tokens in ``probability_sum``."""
    tokens, num_atoms = logits.shape
    row, stride = rows_of(logits)
    native = module_for(row, weights)
    if native is not None and logits.dtype == torch.float32 and top_k <= MOST_SELECTED:
        values, indices = logits.new_empty(tokens, top_k), logits.new_empty(tokens, top_k, dtype=torch.int64)
        log_normalizer, probability_sum = logits.new_empty(tokens), logits.new_empty(num_atoms)
        native.select_rows(
            logits=logits,
            weights=weights,
            values=values,
            indices=indices,
            log_normalizer=log_normalizer,
            probability_sum=probability_sum,
            tokens=tokens,
            num_atoms=num_atoms,
            top_k=top_k,
            stride=stride,
            threads=torch.get_num_threads(),
            clamp=logit_clamp,
        )
        return values, indices, log_normalizer, probability_sum
    return _forward_by_tensors(logits, weights, top_k, logit_clamp)


def _forward_by_tensors(
    logits: Tensor, weights: Tensor | None, top_k: int, logit_clamp: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    tokens, num_atoms = logits.shape
    values, indices = logits.topk(top_k, dim=1)
    log_normalizer, probability_sum = logits.new_empty(tokens), logits.new_zeros(num_atoms)
    clamped = _beyond(logits, logit_clamp)
    for rows in _chunks(logits):
        chunk = logits[rows].clamp(-logit_clamp, logit_clamp) if clamped else logits[rows]
        largest = values[rows, :1].clamp(-logit_clamp, logit_clamp) if clamped else values[rows, :1]
        exponentials = torch.sub(chunk, largest).exp_()
        total = exponentials.sum(1)
        torch.add(total.log(), largest.squeeze(1), out=log_normalizer[rows])
        share = total.reciprocal()
        if weights is not None:
            # Tokens that do not count may be NaN.
            left_out = weights[rows] == 0
            share = (share * weights[rows]).masked_fill_(left_out, 0.0)
            exponentials.masked_fill_(left_out.unsqueeze(1), 0.0)
        probability_sum.addmv_(exponentials.t(), share)
    return values, indices, log_normalizer, probability_sum


@_select_op.register_fake
def _(logits: Tensor, weights: Tensor | None, top_k: int, *_: Any) -> tuple[Tensor, ...]:
    tokens, num_atoms = logits.shape
    return (
        logits.new_empty(tokens, top_k),
        logits.new_empty(tokens, top_k, dtype=torch.int64),
        logits.new_empty(tokens),
        logits.new_empty(num_atoms),
    )


@library.custom_op("torchdsc::select_backward", mutates_args=())
def _select_backward_op(
    logits: Tensor,
    weights: Tensor | None,
    indices: Tensor,
    log_normalizer: Tensor,
    grad_values: Tensor,
    grad_log_normalizer: Tensor,
    grad_probability_sum: Tensor,
    logit_clamp: float,
) -> Tensor:
    gradients = grad_values, grad_log_normalizer, grad_probability_sum
    return select_backward(logits, weights, indices, log_normalizer, *gradients, logit_clamp)


def largest(logits: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """``logits.topk(top_k)`` of logits (T, M), without gradients; ties may be broken differently."""
    row, stride = rows_of(logits)
    native = module_for(row)
    if native is None or logits.dtype != torch.float32 or top_k > MOST_SELECTED:
        values, indices = logits.topk(top_k)
        return values, indices
    tokens, num_atoms = logits.shape
    values, indices = logits.new_empty(tokens, top_k), logits.new_empty(tokens, top_k, dtype=torch.int64)
    threads = torch.get_num_threads() if logits.numel() > _FEW_LOGITS else 1
    native.largest_of_rows(
        logits=logits,
        values=values,
        indices=indices,
        tokens=tokens,
        num_atoms=num_atoms,
        top_k=top_k,
        stride=stride,
        threads=threads,
    )
    return values, indices


def select_backward(
    logits: Tensor,
    weights: Tensor | None,
    indices: Tensor,
    log_normalizer: Tensor,
    grad_values: Tensor,
    grad_log_normalizer: Tensor,
    grad_probability_sum: Tensor,
    logit_clamp: float,
    out: Tensor | None = None,
) -> Tensor:
    """Gradient of the logits (T, M), given those of the results of :func:`select_forward`; written to ``out``."""
    grad = torch.empty_like(logits) if out is None else out
    grad_values, grad_log_normalizer = grad_values.contiguous(), grad_log_normalizer.contiguous()
    grad_probability_sum = grad_probability_sum.contiguous()
    gradients = grad_values, grad_log_normalizer, grad_probability_sum
    (row, stride), (grad_row, grad_stride) = rows_of(logits), rows_of(grad)
    native = module_for(row, grad_row, weights, indices, log_normalizer, *gradients)
    if native is not None and logits.dtype == torch.float32:
        native.select_rows_backward(
            logits=logits,
            weights=weights,
            indices=indices,
            log_normalizer=log_normalizer,
            grad_values=grad_values,
            grad_log_normalizer=grad_log_normalizer,
            grad_probability_sum=grad_probability_sum,
            grad=grad,
            tokens=logits.shape[0],
            num_atoms=logits.shape[1],
            top_k=indices.shape[1],
            stride=stride,
            grad_stride=grad_stride,
            threads=torch.get_num_threads(),
            clamp=logit_clamp,
        )
        return grad
    return _backward_by_tensors(logits, weights, indices, log_normalizer, *gradients, logit_clamp, grad)


def _backward_by_tensors(
    logits: Tensor,
    weights: Tensor | None,
    indices: Tensor,
    log_normalizer: Tensor,
    grad_values: Tensor,
    grad_log_normalizer: Tensor,
    grad_probability_sum: Tensor,
    logit_clamp: float,
    grad: Tensor,
) -> Tensor:
    clamped = _beyond(logits, logit_clamp)
    for rows in _chunks(logits):
        chunk = logits[rows].clamp(-logit_clamp, logit_clamp) if clamped else logits[rows]
        out = torch.sub(chunk, log_normalizer[rows].unsqueeze(1), out=grad[rows]).exp_()
        # The gradient of w g . p + h logsumexp(r) with p = softmax(r) is p (h + w (g - g . p)).
        mean = torch.mv(out, grad_probability_sum)
        if weights is None:
            out *= grad_probability_sum + (grad_log_normalizer[rows] - mean).unsqueeze(1)
        else:
            weight = weights[rows]
            constant = grad_log_normalizer[rows] - weight * mean
            out *= torch.addr(constant.unsqueeze(1), weight, grad_probability_sum)
            # Rows without a gradient may be NaN.
            out.masked_fill_(((weight == 0) & (grad_log_normalizer[rows] == 0)).unsqueeze(1), 0.0)
        if clamped:
            out.masked_fill_(logits[rows].abs() > logit_clamp, 0.0)
    return grad.scatter_add_(1, indices, grad_values)


@_select_backward_op.register_fake
def _(logits: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(logits)


def _beyond(logits: Tensor, logit_clamp: float) -> bool:
    """Whether clamping may change logits; assumed on a GPU, where the check would wait for the device."""
    if logits.device.type != "cpu" or logits.numel() == 0:
        return logits.numel() > 0
    low, high = torch.aminmax(logits)
    return not (low >= -logit_clamp and high <= logit_clamp)


def _chunks(logits: Tensor) -> list[slice]:
    tokens, num_atoms = logits.shape
    size = max(1, _CHUNK["cpu" if logits.device.type == "cpu" else "other"] // num_atoms)
    return [slice(start, min(start + size, tokens)) for start in range(0, tokens, size)]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, weights, _, ctx.logit_clamp = inputs
    _, indices, log_normalizer, _ = output
    ctx.mark_non_differentiable(indices)
    ctx.save_for_backward(indices, logits, weights, log_normalizer)


def _backward(
    ctx: Any, grad_values: Tensor, _: Tensor | None, grad_log_normalizer: Tensor, grad_probability_sum: Tensor
) -> tuple[Tensor | None, ...]:
    indices, logits, weights, log_normalizer = ctx.saved_tensors
    grad = _select_backward_op(
        logits,
        weights,
        indices,
        log_normalizer,
        grad_values,
        grad_log_normalizer,
        grad_probability_sum,
        ctx.logit_clamp,
    )
    return grad, None, None, None


_select_op.register_autograd(_backward, setup_context=_setup_context)
