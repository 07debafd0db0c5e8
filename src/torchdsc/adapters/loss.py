"""The regularisers in the loss of a Hugging Face model, without a line in the training loop.

A model that its loss is computed in gets the terms added to it. Under transformers' Trainer they are exact whatever the
accumulation: with ``num_items_in_batch`` they are sums over routed tokens divided by it, as the task's loss is. Models
that average their loss over each micro-batch although they accept that argument are told not to, so that Trainer
averages the losses of micro-batches; their regularisers follow. A backward pass that goes past the loss with the terms
in it raises.
"""

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss

from torchdsc.losses import Regularization, regularization_of
from torchdsc.nn import RoutedLayer, RoutingStatistics

from .layer import AdapterLayer, trains

_TERMS = "_torchdsc_terms"
_HANDLE = "_torchdsc_handle"
# Whether the last call in training had no loss to add the terms to.
_PENDING = "_torchdsc_pending"


def add_regularization(model: nn.Module) -> None:
    """From now on ``model``, a Hugging Face model with adapters, adds their regularisers to its loss in training."""
    if not isinstance(model, PreTrainedModel) or _HANDLE in model.__dict__:
        return
    if not sums_loss(model) and not hasattr(model, "accepts_loss_kwargs"):
        model.accepts_loss_kwargs = False
    model.__dict__[_HANDLE] = model.register_forward_hook(_add, with_kwargs=True)


def leave_regularization(model: nn.Module) -> None:
    """Undo :func:`add_regularization`."""
    handle = model.__dict__.pop(_HANDLE, None)
    if handle is not None:
        handle.remove()
        if model.__dict__.get("accepts_loss_kwargs") is False:
            del model.__dict__["accepts_loss_kwargs"]


def last_regularization(model: nn.Module) -> dict[str, float]:
    """The terms that the last loss of ``model`` in training held, for a log; empty before the first.

    Args:
        model: A Hugging Face model with adapters, or the PEFT model around it.

    Returns:
        "total" (weighted), "aux", "budget", "frame" and "z".
    """
    for module in model.modules():
        terms: Regularization | None = module.__dict__.get(_TERMS)
        if terms is not None:
            return terms.as_dict()
    return {}


def sums_loss(model: PreTrainedModel) -> bool:
    """Whether ``model`` divides the sum of its losses by the ``num_items_in_batch`` it is given.

    Most models accept the argument and average regardless. Those that do not average call ``self.loss_function``, of
    a kind that takes the number.
    """
    code = getattr(inspect.unwrap(type(model).forward), "__code__", None)
    if code is None or "loss_function" not in code.co_names:
        return False
    return "num_items_in_batch" in inspect.signature(model.loss_function).parameters


def _add(model: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    if not model.training:
        return None
    layers = [layer for layer in _active_layers(model) if layer.regularizers.any]
    if not torch.is_grad_enabled():
        _forget_without_gradient(layers)
        return None
    model.__dict__[_PENDING] = False
    if not any(layer.statistics_log.entries or not layer.regularizers.need_tokens for layer in layers):
        return None
    # TRL's trainers, which say so, take their loss from other outputs than the model's.
    loss = None if kwargs.get("fused_lm_head") else _loss_of(output)
    items = kwargs.get("num_items_in_batch")
    if loss is None:
        if items is not None:
            raise ValueError(
                "labels must reach the model in training, got num_items_in_batch without them: label smoothing and "
                "compute_loss_func of Trainer take them out, and the regularisers with them. Set the adapter's weights "
                "of regularisers to 0, or compute the loss in a Trainer of your own under RegularizedLoss"
            )
        _demand_collection(output, layers)
        model.__dict__[_PENDING] = True
        return None
    collected = [(layer, entry) for layer in layers for entry in layer.statistics_log.take()]
    if not sums_loss(model):
        items = None
    precise = torch.promote_types(loss.dtype, torch.float32)
    share = None if items is None else labelled(model, args, kwargs).to(precise) / items
    terms = regularization_of(collected, num_tokens=items, frame_share=share, frame_layers=layers)
    model.__dict__[_TERMS] = Regularization(*(value.detach() for value in vars(terms).values()))
    total = loss + terms.total.to(loss.dtype)
    _demand_use(output, loss, total)
    return _with_loss(output, total)


def _active_layers(model: nn.Module) -> Iterator[RoutedLayer]:
    """Layers that train: of active adapters, with a router that wants gradients."""
    for module in model.modules():
        if isinstance(module, AdapterLayer):
            yield from (layer for layer in module.active_layers() if trains(layer))


def base_of(model: nn.Module) -> PreTrainedModel:
    """The Hugging Face model whose loss has been extended, inside its wrappers."""
    return next(
        module for module in model.modules() if isinstance(module, PreTrainedModel) and _HANDLE in module.__dict__
    )


def is_pending(model: PreTrainedModel) -> bool:
    """Whether the last call of ``model`` in training has left its regularisers for somebody to collect."""
    return bool(model.__dict__.get(_PENDING, False))


def _forget_without_gradient(layers: list[RoutedLayer]) -> None:
    """What a call in training mode under ``torch.no_grad`` has left: nothing trains on it."""
    for layer in layers:
        entries = layer.statistics_log.take()
        layer.statistics_log.entries = [entry for entry in entries if any(part.requires_grad for part in entry[1:4])]


def labelled(model: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Labels of this call, counted as Trainer counts those of the step: a causal LM shifts them."""
    labels = kwargs.get("shift_labels")
    if labels is None:
        given = {**dict(zip(inspect.signature(model.forward).parameters, args, strict=False)), **kwargs}
        labels = given["labels"]
        is_causal = LOSS_MAPPING.get(model.loss_type) is ForCausalLMLoss
        if is_causal and not model.config.is_encoder_decoder:
            labels = labels[..., 1:]
    count: Tensor = (labels != -100).sum()
    return count


def _loss_of(output: Any) -> Tensor | None:
    if isinstance(output, dict):
        return output.get("loss")
    first = output[0] if isinstance(output, tuple) and output else None
    return first if isinstance(first, Tensor) and first.dim() == 0 else None


def _with_loss(output: Any, loss: Tensor) -> Any:
    if isinstance(output, tuple):
        return (loss, *output[1:])
    output["loss"] = loss
    return output


def _demand_collection(output: Any, layers: list[RoutedLayer]) -> None:
    """Raise in the backward pass through ``output`` if nobody has collected the regularisers by then."""
    if torch.compiler.is_compiling():
        return
    kept: list[tuple[RoutedLayer, RoutingStatistics]] = [
        (layer, entry) for layer in layers for entry in layer.statistics_log.entries
    ]

    def check(_: Tensor) -> None:
        if any(entry is other for layer, entry in kept for other in layer.statistics_log.entries):
            raise RuntimeError(
                "the regularisers were not collected before the backward pass: the model had no labels, or its loss is "
                "not the one in use, so that they are in no loss. Give it labels, add "
                f"torchdsc.regularization(model).total to the loss, {_OR_NONE}"
            )

    _hook_values(output, check)


def _demand_use(output: Any, loss: Tensor, total: Tensor) -> None:
    """Raise in a backward pass that reaches ``output`` but has not come through ``total``, its loss."""
    if torch.compiler.is_compiling() or not total.requires_grad:
        return
    used: list[bool] = []

    def check(_: Tensor) -> None:
        if not used:
            raise RuntimeError(
                "the model's loss, which holds the regularisers, is not in the loss of this backward pass. Use it, or "
                "leave labels out of the call and add torchdsc.regularization(model).total to the loss, "
                f"{_OR_NONE}"
            )

    total.register_hook(lambda _: used.append(True))
    _hook_values(output, check, besides=loss)


_OR_NONE = (
    "put torchdsc.adapters.RegularizedLoss before the trainer's class, or set the adapter's aux_weight, budget_weight, "
    "frame_weight and z_weight to 0"
)


def _hook_values(output: Any, hook: Callable[[Tensor], None], besides: Tensor | None = None) -> None:
    for value in _tensors(output):
        if value.requires_grad and value is not besides:
            value.register_hook(hook)


def _tensors(output: Any) -> Iterator[Tensor]:
    """Every tensor of an output, hidden states and the like included."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, dict | list | tuple):
        for value in output.values() if isinstance(output, dict) else output:
            yield from _tensors(value)
