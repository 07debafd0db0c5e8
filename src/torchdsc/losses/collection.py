"""Collection of the regularisers of a model.

Micro-batches and processes do not change their weight. L_z is linear in tokens, so that its parts add up. L_aux and
L_budget are nonlinear functions of batch means: they are token-weighted means of their values per micro-batch and
process, or with ``synchronize`` functions of means over all processes. L_frame depends on no data: its shares add up to
one per step.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from torchdsc.arguments import check_not_negative, check_positive, check_types
from torchdsc.nn import RoutedLayer, RoutingStatistics
from torchdsc.nn.statistics_log import WITHOUT_GRADIENT, Use

from .terms import aux_loss, budget_loss, frame_loss, z_loss


@dataclass(frozen=True)
class Regularization:
    """Regularisers of a model: what to add to the loss, and what to log.

    Attributes:
        total: Weighted sum of equation (13) over layers, differentiable.
        aux: L_aux summed over layers; unweighted and detached, like the next three.
        budget: L_budget summed over layers.
        frame: L_frame summed over banks.
        z: L_z summed over layers.
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

    Add ``.total`` to the task loss; a backward pass through the layers that has not come through it before warns. Only
    forward passes in training mode count whose output, or something computed from it, still exists; through others
    nothing can be trained. With gradient accumulation or several processes, pass ``num_tokens``, the tokens of the
    whole optimizer step, and sum the losses (under DistributedDataParallel, which averages gradients, multiply them by
    the number of processes). Then L_z and L_frame are the same however a step is split.

    Args:
        model: Any module that contains DSC layers.
        num_tokens: Counted tokens of the whole optimizer step, over all micro-batches and processes. By default those
            of each forward pass, whose terms then are means over its own tokens.
        frame_share: Share of L_frame in this call; shares must add up to 1 over a step. By default the share of tokens.
            Pass 0 if you call :func:`frame_regularization` once a step.
        synchronize: Take the batch means of L_aux and L_budget over all processes of the default group, as after
            :func:`synchronize_regularization`.

    Returns:
        The weighted total and the terms; zeros if no routed layer has a regulariser of positive weight.

    Raises:
        TypeError: If an argument has another type.
        ValueError: If a number is out of its range, ``model`` has no routed layer, or there is no forward pass in
            training mode to collect.
        RuntimeError: If a layer's statistics carry no gradient although its router requires one, as after reentrant
            checkpointing or ``torch.no_grad``.
    """
    _check_arguments(model, num_tokens, frame_share, synchronize)
    layers = [layer for layer in _routed_layers(model) if layer.regularizers.any]
    if not layers:
        # Nothing is regularised, as where atoms are addressed by n-grams.
        return _Sums(list(model.parameters())).result()
    use = Use()
    collected = [(layer, entry) for layer in layers for entry in layer.statistics_log.take(use=use)]
    if not collected and any(layer.training and layer.regularizers.need_tokens for layer in layers):
        raise ValueError(
            "model must have run in training mode since the last collection, and its output must still be there, got "
            "no statistics. A Hugging Face model with labels adds its regularisers to its loss itself"
        )
    found = regularization_of(
        collected, num_tokens=num_tokens, frame_share=frame_share, synchronize=synchronize, frame_layers=layers
    )
    if torch.compiler.is_compiling() or not found.total.requires_grad:
        use.see()
    else:
        found.total.register_hook(use.see)  # type: ignore[no-untyped-call]
    return found


def synchronize_regularization(model: nn.Module, *, enabled: bool = True) -> None:
    """Take the batch means of L_aux and L_budget over all processes, in whichever loop ``model`` is trained.

    They are then the same however many processes share a step, also where transformers' Trainer adds them to the loss.
    All processes must compute the loss equally often, or the others wait for them: in training mode, with tokens or
    without. In a single process nothing changes. It is not saved with the model.

    Args:
        model: With DSC or other routed layers; those that are added later are not marked.
        enabled: False to undo it.

    Raises:
        ValueError: If ``model`` has no routed layer.
    """
    for layer in _routed_layers(model):
        layer.synchronizes_statistics = enabled


def _routed_layers(model: nn.Module) -> list[RoutedLayer]:
    layers = [module for module in model.modules() if isinstance(module, RoutedLayer)]
    if not layers:
        raise ValueError(f"model must hold a DSC or other routed layer, got {type(model).__name__} without one")
    return layers


def _check_arguments(
    model: nn.Module, num_tokens: Tensor | float | None, frame_share: Tensor | float | None, synchronize: bool
) -> None:
    if torch.compiler.is_compiling():
        return
    check_types(_check_arguments, locals())
    # Tensors are not checked, as that would wait for the device.
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
    """:func:`regularization` of statistics that :meth:`torchdsc.Routing.take_statistics` returned.

    Args:
        collected: Pairs of a layer and its statistics, one for each forward pass.
        num_tokens: See :func:`regularization`.
        frame_share: See :func:`regularization`.
        synchronize: See :func:`regularization`.
        frame_layers: Layers whose banks L_frame is computed for; by default those in ``collected``.

    Returns:
        The weighted total and the terms.
    """
    collected = list(collected)
    frame_layers = [layer for layer, _ in collected] if frame_layers is None else list(frame_layers)
    # Prefer the statistics' device to that of parameters, which may be offloaded.
    counts = [entry.num_tokens for _, entry in collected]
    sums = _Sums(counts or [parameter for layer in frame_layers for parameter in layer.parameters()])
    token_share: Tensor | float = 1.0 if num_tokens is None or not collected else 0.0
    for layer, entry in collected:
        _check_gradient(layer, entry)
        mean = _synchronized(entry) if synchronize or layer.synchronizes_statistics else entry
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
    """Weighted L_frame of every bank in ``model``, equation (11), to be called once per optimizer step.

    Args:
        model: Any module that contains DSC layers.

    Returns:
        Scalar; 0 if no layer has a positive ``frame_weight``.
    """
    sums = _Sums(list(model.parameters()))
    layers = list(_regularized_layers(model))
    _add_frame(sums, layers, 1.0)
    for layer in layers:
        if not layer.regularizers.need_tokens:
            # These layers have no other term to collect.
            layer.statistics_log.take()
    return sums.result().total


class _Sums:
    """Running sums of the weighted total and of the detached terms."""

    def __init__(self, like: list[Tensor]) -> None:
        """Start at zero, on the device of the first tensor in ``like`` and in its dtype, at least float32."""
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
    """Add L_frame of each bank, once if layers share it, with the weight of the first. Frozen banks are left out."""
    seen: set[int] = set()
    for layer in layers:
        bank, weights = getattr(layer, "bank", None), layer.regularizers
        if not isinstance(bank, nn.Module) or weights.frame == 0 or id(bank) in seen:
            continue
        seen.add(id(bank))
        # Flattened by FSDP1, a bank has no parameters: it is not frozen.
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
    """Sums over all processes, with a gradient for this process's part.

    All processes compute the same value, and each weights it by its share of the tokens. For their gradients to add up
    to that of the value, the gradient of the own part is scaled by the inverse of that share.
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
