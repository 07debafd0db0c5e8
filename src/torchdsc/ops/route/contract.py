"""The operator ``torchdsc::route``, whose forward and backward passes work on chunks of logits that stay in cache.

For the backward pass the logits are kept, or computed again so that no T x M tensor exists.
"""

from typing import Any

import torch
from torch import Tensor, library

from torchdsc.ops.select import largest, select_backward, select_forward

from . import triton

# Bytes of logits per chunk, and the fewest tokens per chunk, below which matrix products are slow.
_CHUNK_BYTES = {"cpu": 1 << 22, "other": 1 << 28}
_CHUNK_TOKENS = 1024


def route_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    weights: Tensor | None,
    top_k: int,
    logit_clamp: float,
    statistics: bool,
    keep: bool,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The fields of ``Selection``, without gradients, and the logits (T, M) if ``keep``, else none (0, M).

    ``weights`` (T,) weight tokens in ``probability_sum``; ``impl`` is "chunks", or "triton", which keeps no logits.
    """
    if impl == "triton":
        found = triton.forward(x, weight, bias, weights, top_k, logit_clamp, statistics)
        return *found, _logits(x, 0, weight.shape[0])
    tokens, num_atoms = x.shape[0], weight.shape[0]
    values, indices = x.new_empty(tokens, top_k), x.new_empty(tokens, top_k, dtype=torch.int64)
    log_normalizer, probability_sum = x.new_empty(tokens if statistics else 0), x.new_zeros(num_atoms * statistics)
    chunks = _chunks(x, num_atoms)
    kept, room = _logits(x, tokens if keep else 0, num_atoms), _logits(x, 0 if keep else _longest(chunks), num_atoms)
    for rows in chunks:
        logits = _linear(x[rows], weight, bias, kept[rows] if keep else room[: rows.stop - rows.start])
        if not statistics:
            values[rows], indices[rows] = largest(logits, top_k)
            continue
        counted = None if weights is None else weights[rows]
        found = select_forward(logits, counted, top_k, logit_clamp)
        values[rows], indices[rows], log_normalizer[rows] = found[:3]
        probability_sum += found[3]
    return values, indices, log_normalizer, probability_sum, kept


@library.custom_op("torchdsc::route", mutates_args=())
def route_op(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    weights: Tensor | None,
    top_k: int,
    logit_clamp: float,
    statistics: bool,
    keep: bool,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """:func:`route_forward` with gradients."""
    with torch.autocast(x.device.type, enabled=False):
        return route_forward(x, weight, bias, weights, top_k, logit_clamp, statistics, keep, impl)


@route_op.register_fake
def _(x: Tensor, weight: Tensor, *others: Any) -> tuple[Tensor, ...]:
    _, _, top_k, _, statistics, keep, _ = others
    tokens = x.shape[0]
    return (
        x.new_empty(tokens, top_k),
        x.new_empty(tokens, top_k, dtype=torch.int64),
        x.new_empty(tokens if statistics else 0),
        x.new_empty(weight.shape[0] if statistics else 0),
        _logits(x, tokens if keep else 0, weight.shape[0]),
    )


@library.custom_op("torchdsc::route_backward", mutates_args=())
def route_backward_op(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    weights: Tensor | None,
    indices: Tensor,
    log_normalizer: Tensor,
    kept: Tensor,
    grad_values: Tensor,
    grad_log_normalizer: Tensor,
    grad_probability_sum: Tensor,
    logit_clamp: float,
    statistics: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias (empty if there is none), from logits that were kept or are computed again."""
    dx, dweight = torch.empty_like(x), torch.zeros_like(weight, memory_format=torch.contiguous_format)
    dbias = x.new_zeros(0 if bias is None else weight.shape[0])
    chunks = _chunks(x, weight.shape[0])
    room = _logits(x, _longest(chunks), weight.shape[0])
    again = _logits(x, 0 if kept.shape[0] or not statistics else room.shape[0], weight.shape[0])
    with torch.autocast(x.device.type, enabled=False):
        for rows in chunks:
            count = rows.stop - rows.start
            grad = room[:count]
            if statistics:
                logits = kept[rows] if kept.shape[0] else _linear(x[rows], weight, bias, again[:count])
                counted = None if weights is None else weights[rows]
                gradients = grad_values[rows], grad_log_normalizer[rows], grad_probability_sum
                select_backward(logits, counted, indices[rows], log_normalizer[rows], *gradients, logit_clamp, out=grad)
            else:
                grad.zero_().scatter_(1, indices[rows], grad_values[rows])
            torch.mm(grad, weight, out=dx[rows])
            dweight.addmm_(grad.t(), x[rows])
            if bias is not None:
                dbias += grad.sum(0)
    return dx, dweight, dbias


@route_backward_op.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, *_: Any) -> tuple[Tensor, ...]:
    dweight = torch.empty_like(weight, memory_format=torch.contiguous_format)
    return torch.empty_like(x), dweight, x.new_empty(0 if bias is None else weight.shape[0])


def _logits(like: Tensor, tokens: int, num_atoms: int) -> Tensor:
    """Memory for logits (T, M) whose rows start at multiples of 16 elements, which matrix products write faster."""
    return like.new_empty_strided((tokens, num_atoms), (-(-num_atoms // 16) * 16, 1))


def _longest(chunks: list[slice]) -> int:
    return max((rows.stop - rows.start for rows in chunks), default=0)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> Tensor:
    if bias is None:
        return torch.mm(x, weight.t(), out=out)
    return torch.addmm(bias, x, weight.t(), out=out)


def _chunks(x: Tensor, num_atoms: int) -> list[slice]:
    budget = _CHUNK_BYTES["cpu" if x.device.type == "cpu" else "other"]
    size = max(_CHUNK_TOKENS, budget // (num_atoms * x.element_size()))
    return [slice(start, min(start + size, x.shape[0])) for start in range(0, x.shape[0], size)]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, bias, weights, _, ctx.logit_clamp, ctx.statistics, *_ = inputs
    _, indices, log_normalizer, _, kept = output
    ctx.mark_non_differentiable(indices, kept)
    # Materialised, the gradient of the logits would be zeros as large as they are.
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, weight, bias, weights, indices, log_normalizer, kept)


def _backward(
    ctx: Any,
    grad_values: Tensor | None,
    _: Tensor | None,
    grad_log_normalizer: Tensor | None,
    grad_probability_sum: Tensor | None,
    __: Tensor | None,
) -> tuple[Tensor | None, ...]:
    # Read once, as under checkpointing each access recomputes.
    saved = x, weight, _, _, indices, *_ = ctx.saved_tensors
    tokens, num_atoms = (x.shape[0], weight.shape[0]) if ctx.statistics else (0, 0)
    shapes = (indices.shape, (tokens,), (num_atoms,))
    given = grad_values, grad_log_normalizer, grad_probability_sum
    gradients = [x.new_zeros(shape) if g is None else g for g, shape in zip(given, shapes, strict=True)]
    dx, dweight, dbias = route_backward_op(*saved, *gradients, ctx.logit_clamp, ctx.statistics)
    return dx, dweight, None if saved[2] is None else dbias, None, None, None, None, None, None


route_op.register_autograd(_backward, setup_context=_setup_context)
