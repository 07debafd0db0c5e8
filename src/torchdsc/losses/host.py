"""Regularisers added to the loss of a Hugging Face model, with no change to the training loop.

If the model is called with labels, the regularisers are added to the loss it returns. Under transformers' Trainer they
do not depend on gradient accumulation: like the task loss, they are sums over tokens divided by ``num_items_in_batch``.
Some models accept that argument but average their loss over each micro-batch. Trainer is told so and averages the
micro-batches, and the regularisers are means over a micro-batch too. A backward pass that starts from another output
than the loss raises, because it would leave the regularisers out.
"""

import inspect
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from torchdsc.arguments import named_arguments
from torchdsc.nn import RoutedLayer
from torchdsc.nn.statistics_log import UNUSED, next_number

from .collection import Regularization, regularization_of

_TERMS = "_torchdsc_terms"
_HANDLES = "_torchdsc_handles"
# Number of the first forward pass of the model's current call, from next_number().
_SINCE = "_torchdsc_since"


def is_pretrained(model: nn.Module) -> bool:
    """Whether ``model`` is a ``transformers.PreTrainedModel``, without importing transformers."""
    transformers = sys.modules.get("transformers")
    return transformers is not None and isinstance(model, transformers.PreTrainedModel)


def add_regularization(model: nn.Module) -> None:
    """Make a Hugging Face ``model`` add the regularisers to its loss in training; does nothing for other models."""
    if not is_pretrained(model) or _HANDLES in model.__dict__:
        return
    if not sums_loss(model) and not hasattr(model, "accepts_loss_kwargs"):
        model.accepts_loss_kwargs = False  # type: ignore[assignment]
    model.__dict__[_HANDLES] = (
        model.register_forward_pre_hook(_begin),
        model.register_forward_hook(_add, with_kwargs=True),
    )


def leave_regularization(model: nn.Module) -> None:
    """Undo :func:`add_regularization`."""
    handles = model.__dict__.pop(_HANDLES, ())
    for handle in handles:
        handle.remove()
    if handles and model.__dict__.get("accepts_loss_kwargs") is False:
        del model.__dict__["accepts_loss_kwargs"]


def last_regularization(model: nn.Module) -> dict[str, float]:
    """The regularisers in the last training loss of ``model``, for a log; empty before the first loss.

    Args:
        model: A Hugging Face model with adapters or converted layers, or a module that contains one.

    Returns:
        "total" (weighted), "aux", "budget", "frame" and "z".
    """
    for module in model.modules():
        terms: Regularization | None = module.__dict__.get(_TERMS)
        if terms is not None:
            return terms.as_dict()
    return {}


def sums_loss(model: nn.Module) -> bool:
    """Whether a Hugging Face model divides the sum of its losses by ``num_items_in_batch``.

    Many models accept the argument and average regardless. A model uses it if its ``forward`` calls
    ``self.loss_function`` and that function takes the argument.
    """
    code = getattr(inspect.unwrap(type(model).forward), "__code__", None)
    if code is None or "loss_function" not in code.co_names:
        return False
    return "num_items_in_batch" in inspect.signature(model.loss_function).parameters  # type: ignore[arg-type]


def labelled(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """Number of labels in a call, counted as Trainer does (a causal LM shifts them); None without labels."""
    labels = kwargs.get("shift_labels")
    if labels is None:
        names = tuple(inspect.signature(model.forward).parameters)
        labels = named_arguments(names, args, kwargs).get("labels")
        if isinstance(labels, Tensor) and _shifts_labels(model):
            labels = labels[..., 1:]
    return (labels != -100).sum() if isinstance(labels, Tensor) else None


def _shifts_labels(model: nn.Module) -> bool:
    from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss

    is_causal = LOSS_MAPPING.get(model.loss_type) is ForCausalLMLoss
    return is_causal and not model.config.is_encoder_decoder  # type: ignore[union-attr]


def demand_use(output: Any, loss: Tensor, total: Tensor) -> None:
    """Make a backward pass raise if it reaches ``output`` without going through ``total``.

    Args:
        output: What a model returns: a tensor, or a mapping or sequence of tensors.
        loss: The task loss, which ``total`` is computed from, and which is not checked.
        total: The loss with the regularisers.
    """
    if torch.compiler.is_compiling() or not total.requires_grad:
        return
    used: list[bool] = []

    def check(_: Tensor) -> None:
        if not used:
            raise RuntimeError(UNUSED)

    total.register_hook(lambda _: used.append(True))  # type: ignore[no-untyped-call]
    for value in _tensors(output):
        if value.requires_grad and value is not loss and value is not total:
            value.register_hook(check)  # type: ignore[no-untyped-call]


def _begin(model: nn.Module, args: tuple[Any, ...]) -> None:
    if not torch.compiler.is_compiling():
        model.__dict__[_SINCE] = next_number()


def _add(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    if not model.training or not torch.is_grad_enabled():
        return None
    # TRL's trainers pass this when they compute the loss from other outputs of the model.
    loss = None if kwargs.get("fused_lm_head") else _loss_of(output)
    if loss is None:
        return None
    items = kwargs.get("num_items_in_batch") if sums_loss(model) else None
    count = None if items is None else labelled(model, args, kwargs)
    since = 0 if torch.compiler.is_compiling() else model.__dict__[_SINCE]
    found = regularized(model, loss, output, since=since, num_items=items, num_labels=count)
    return None if found is None else _with_loss(output, found[0])


def regularized(
    model: nn.Module,
    loss: Tensor,
    output: Any,
    *,
    since: int,
    num_items: Tensor | float | None,
    num_labels: Tensor | None,
) -> tuple[Tensor, Regularization] | None:
    """Add the regularisers of a call to the loss of a Hugging Face model.

    Args:
        model: The model.
        loss: The task loss.
        output: All other outputs of the model. A backward pass from these without the returned loss raises.
        since: Number of the first forward pass of the call, from
            :func:`torchdsc.nn.statistics_log.next_number`; 0 when compiled.
        num_items: Number of labelled tokens in the whole step, if the loss is a sum divided by it; else None.
        num_labels: Number of labelled tokens in this call, scalar; None if unknown.

    Returns:
        The loss to train on, and the regularisers, detached but for ``total``; None if there are none.
    """
    layers = [
        module
        for module in model.modules()
        if isinstance(module, RoutedLayer) and module.statistics_log.waits(since, wanted=False)
    ]
    if not any(layer.statistics_log.waits(since) for layer in layers):
        return None
    collected = [(layer, entry) for layer in layers for entry in layer.statistics_log.take(since)]
    share = None
    if num_items is not None and num_labels is not None:
        # In the precision of the statistics, as the loss may have less.
        precise = collected[0][1].num_tokens.dtype if collected else torch.promote_types(loss.dtype, torch.float32)
        share = num_labels.to(precise) / num_items
    terms = regularization_of(collected, num_tokens=num_items, frame_share=share, frame_layers=layers)
    model.__dict__[_TERMS] = Regularization(*(value.detach() for value in vars(terms).values()))
    total = loss + terms.total.to(loss.dtype)
    demand_use(output, loss, total)
    return total, terms


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


def _tensors(output: Any) -> Iterator[Tensor]:
    """Every tensor in an output, also in nested containers."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, dict | list | tuple):
        for value in output.values() if isinstance(output, dict) else output:
            yield from _tensors(value)
