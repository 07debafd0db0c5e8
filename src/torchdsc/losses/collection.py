"""The regularisers of a model, collected.

How their weight stays exact however the work is cut up: L_z is linear in tokens, so that the shares of micro-batches
and processes add up. L_aux and L_budget are nonlinear in batch means and equal the token-weighted mean of their values
per micro-batch; ``synchronize`` takes the means over all processes instead. L_frame needs no data: its shares add up
to one a step.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from torchdsc.arguments import check_not_negative, check_positive, check_types
from torchdsc.nn import RoutedLayer, RoutingStatistics
from torchdsc.nn.statistics_log import WITHOUT_GRADIENT

from .terms import aux_loss, budget_loss, frame_loss, z_loss


@dataclass(frozen=True)
class Regularization:
    """Regularisers of a model: what to add to the loss, and what to log.

    Attributes:
        total: Weighted sum of equation (13) over layers, differentiable.
        aux: L_aux summed over layers, unweighted and detached, like the next three.
        budget: L_budget.
        frame: L_frame, once per bank.
        z: L_z.
    """

    total: Tensor
    aux: Tensor
    budget: Tensor
    frame: Tensor
    z: Tensor

    def as_dict(self) -> dict[str, float]:
        """The values as Python floats, for a log."""
        return {name: float(getattr(self, name).detach()) for name in ("total", "aux", "budget", "frame", "z")}


def regularization(
    model: nn.Module,
    *,
    num_tokens: Tensor | float | None = None,
    frame_share: Tensor | float | None = None,
    synchronize: bool = False,
) -> Regularization:
    """Collect the regularisers of every routed layer in ``model`` that has run since the last collection.

    Add ``.total`` to the task loss. Counted are the forward passes in training whose output, or what was computed of
    it, is still there: nothing can be trained through others. With gradient accumulation or several processes pass
    ``num_tokens``, the tokens of the whole optimizer step, and add up the losses (under DistributedDataParallel, which
    averages gradients, times the number of processes): then L_z and L_frame do not depend on how the step was cut up.

    Args:
        model: Any module that holds DSC layers.
        num_tokens: Counted tokens of the whole optimizer step, over all micro-batches and processes. By default those
            that each layer has just seen.
        frame_share: Share of L_frame that this call carries; shares must add up to 1 over a step. By default the share
            of tokens; 0 leaves it out, for :func:`frame_regularization` once a step.
        synchronize: Take the batch means of L_aux and L_budget over all processes of the default group.

    Returns:
        The weighted total and the terms.

    Raises:
        TypeError: If an argument has another type.
        ValueError: If a number is out of its range, ``model`` has no regularised layer, or no forward pass in training
            waits to be collected.
        RuntimeError: If a layer's statistics carry no gradient although its parameters want one, as under reentrant
            checkpointing or ``torch.no_grad``.
    """
    _check_arguments(model, num_tokens, frame_share, synchronize)
    layers = list(_regularized_layers(model))
    if not layers:
        raise ValueError("model must hold a DSC or other routed layer with a regulariser of positive weight, got none")
    collected = [(layer, entry) for layer in layers for entry in layer.statistics_log.take()]
    if not collected and any(layer.training and layer.regularizers.need_tokens for layer in layers):
        raise ValueError(
            "model must have run in training mode since the last collection, and its output must still be there, got "
            "no statistics. A Hugging Face model with labels adds its regularisers to its loss itself"
        )
    return regularization_of(
        collected, num_tokens=num_tokens, frame_share=frame_share, synchronize=synchronize, frame_layers=layers
    )


def _check_arguments(
    model: nn.Module, num_tokens: Tensor | float | None, frame_share: Tensor | float | None, synchronize: bool
) -> None:
    if torch.compiler.is_compiling():
        return
    check_types(_check_arguments, locals())
    # Values of tensors are not waited for.
    check_positive(num_tokens=None if isinstance(num_tokens, Tensor) else num_tokens)
    check_not_negative(frame_share=None if isinstance(frame_share, Tensor) else frame_share)


def regularization_of(
    collected: Iterable[tuple[RoutedLayer, RoutingStatistics]],
    *,
    num_tokens: Tensor | float | None = None,
    frame_share: Tensor | float | None = None,
    synchronize: bool = False,
    frame_layers: Iterable[RoutedLayer] | None = None,
) -> Regularization:
    """:func:`regularization` of statistics that :meth:`RoutedLayer.forward_with_statistics` returned.

    Args:
        collected: Layers and their statistics, one pair a forward pass.
        num_tokens: See :func:`regularization`.
        frame_share: See :func:`regularization`.
        synchronize: See :func:`regularization`.
        frame_layers: Layers whose banks L_frame is taken of; those collected by default.

    Returns:
        The weighted total and the terms.
    """
    collected = list(collected)
    frame_layers = [layer for layer, _ in collected] if frame_layers is None else list(frame_layers)
    # An offloaded parameter is on another device than what was computed with it.
    counts = [entry.num_tokens for _, entry in collected]
    sums = _Sums(counts or [parameter for layer in frame_layers for parameter in layer.parameters()])
    token_share: Tensor | float = 1.0 if num_tokens is None or not collected else 0.0
    for layer, entry in collected:
        _check_gradient(layer, entry)
        mean = _synchronized(entry) if synchronize else entry
        # A call without a counted token adds nothing, rather than 0 / 0.
        share = entry.num_tokens / (entry.num_tokens.clamp_min(1.0) if num_tokens is None else num_tokens)
        if num_tokens is not None and layer is collected[0][0]:
            token_share = token_share + share
        _add_token_terms(sums, layer, entry, mean, share)
    frame = token_share if frame_share is None else frame_share
    if not (isinstance(frame, (int, float)) and frame == 0):
        _add_frame(sums, frame_layers, frame)
    return sums.result()


def frame_regularization(model: nn.Module) -> Tensor:
    """Weighted L_frame of every bank in ``model``, equation (11), for one call an optimizer step.

    Args:
        model: Any module that holds DSC layers.

    Returns:
        Scalar; 0 without a bank of positive ``frame_weight``.
    """
    sums = _Sums(list(model.parameters()))
    layers = list(_regularized_layers(model))
    _add_frame(sums, layers, 1.0)
    for layer in layers:
        if not layer.regularizers.need_tokens:
            # This was all that they waited for.
            layer.statistics_log.take()
    return sums.result().total


class _Sums:
    """Running sums of the weighted total and of the detached terms."""

    def __init__(self, like: list[Tensor]) -> None:
        """Of the device and, from float32 on, the dtype of the first tensor in ``like``."""
        dtype = torch.promote_types(like[0].dtype, torch.float32) if like else torch.float32
        zero = torch.zeros((), dtype=dtype, device=like[0].device if like else None)
        self.total = zero
        self.terms = dict.fromkeys(("aux", "budget", "frame", "z"), zero)

    def add(self, name: str, value: Tensor, weight: float, share: Tensor | float, factor: Tensor | None) -> None:
        self.terms[name] = self.terms[name] + (value * share).detach()
        weighted = weight * share * value
        self.total = self.total + (weighted if factor is None else weighted * factor)

    def result(self) -> Regularization:
        return Regularization(total=self.total, **self.terms)


def _add_token_terms(
    sums: _Sums, layer: RoutedLayer, entry: RoutingStatistics, mean: RoutingStatistics, share: Tensor
) -> None:
    tokens = mean.num_tokens.clamp_min(1.0)
    weights, factor = layer.regularizers, layer.regularizer_factor()
    if weights.aux > 0:
        sums.add("aux", aux_loss(mean.probability_sum, tokens, mean.load), weights.aux, share, factor)
    if weights.budget > 0:
        value = budget_loss(mean.strength_sum, tokens, weights.budget_target)
        sums.add("budget", value, weights.budget, share, factor)
    if weights.z > 0:
        own = entry.num_tokens.clamp_min(1.0)
        sums.add("z", z_loss(entry.squared_log_normalizer_sum, own), weights.z, share, factor)


def _add_frame(sums: _Sums, layers: Iterable[RoutedLayer], share: Tensor | float) -> None:
    """L_frame of each bank once, however many layers share it, with the weights of the first.

    A frozen bank is left out: its potential is a constant.
    """
    seen: set[int] = set()
    for layer in layers:
        bank, weights = getattr(layer, "bank", None), layer.regularizers
        if not isinstance(bank, nn.Module) or weights.frame == 0 or id(bank) in seen:
            continue
        seen.add(id(bank))
        # Where FSDP1 has flattened them there are no parameters: that bank is not frozen.
        wants_gradient = [parameter.requires_grad for parameter in bank.parameters()]
        if torch.is_grad_enabled() and wants_gradient and not any(wants_gradient):
            continue
        value = frame_loss(bank, weights.eps, normalized=weights.frame_normalized, samples=weights.frame_samples)
        sums.add("frame", value, weights.frame, share, layer.regularizer_factor())


def _regularized_layers(model: nn.Module) -> Iterator[RoutedLayer]:
    return (module for module in model.modules() if isinstance(module, RoutedLayer) and module.regularizers.any)


def _check_gradient(layer: RoutedLayer, entry: RoutingStatistics) -> None:
    if not torch.is_grad_enabled():
        return
    wanted = any(parameter.requires_grad for parameter in layer.router.parameters())
    if wanted and not (entry.strength_sum.requires_grad or entry.probability_sum.requires_grad):
        raise RuntimeError(WITHOUT_GRADIENT)


def _synchronized(entry: RoutingStatistics) -> RoutingStatistics:
    """Sums over all processes, each with the gradient of its own part.

    Every process carries its share of tokens of the same value. For the gradients of all processes to add up to that
    of the value, the own part counts once for each share: it is scaled by the inverse of its own.
    """
    tokens = _all_reduced(entry.num_tokens)
    scale = tokens / entry.num_tokens.clamp_min(1.0)

    def total(own: Tensor) -> Tensor:
        return _all_reduced(own) + scale * (own - own.detach())

    return RoutingStatistics(
        tokens,
        total(entry.probability_sum),
        total(entry.strength_sum),
        entry.squared_log_normalizer_sum,
        None if entry.load is None else _all_reduced(entry.load),
    )


def _all_reduced(tensor: Tensor) -> Tensor:
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return tensor.detach()
    summed = tensor.detach().clone()
    torch.distributed.all_reduce(summed)
    return summed
