"""The regularisers in the loss of a Hugging Face model, without a line in the training loop.

A model that computes its loss gets the terms added to it. Under transformers' Trainer they do not depend on how a step
is accumulated: with ``num_items_in_batch`` they are sums over routed tokens divided by it, as the task's loss is. Some
models average their loss over each micro-batch although they accept that argument. Trainer is told so, and averages the
losses of micro-batches; their regularisers follow. A backward pass that reaches the model's output without having come
through its loss raises.
"""

import inspect
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from torchdsc.nn import RoutedLayer
from torchdsc.nn.statistics_log import UNUSED, next_number

from .collection import Regularization, regularization_of

_TERMS = "_torchdsc_terms"
_HANDLES = "_torchdsc_handles"
# The number of the first forward pass of a layer in the model's current call.
_SINCE = "_torchdsc_since"


def is_pretrained(model: nn.Module) -> bool:
    """Whether ``model`` is a ``transformers.PreTrainedModel``; transformers is not imported to tell."""
    transformers = sys.modules.get("transformers")
    return transformers is not None and isinstance(model, transformers.PreTrainedModel)


def add_regularization(model: nn.Module) -> None:
    """Let a Hugging Face ``model`` add the regularisers of its layers to its loss in training; others do not."""
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
    """The terms that the last loss of ``model`` in training held, for a log; empty before the first.

    Args:
        model: A Hugging Face model with adapters or converted layers, or a model around it.

    Returns:
        "total" (weighted), "aux", "budget", "frame" and "z".
    """
    for module in model.modules():
        terms: Regularization | None = module.__dict__.get(_TERMS)
        if terms is not None:
            return terms.as_dict()
    return {}


def sums_loss(model: nn.Module) -> bool:
    """Whether a Hugging Face model divides the sum of its losses by the ``num_items_in_batch`` it is given.

    Most models accept the argument and average regardless. Those that do not average call ``self.loss_function``, of
    a kind that takes the number.
    """
    code = getattr(inspect.unwrap(type(model).forward), "__code__", None)
    if code is None or "loss_function" not in code.co_names:
        return False
    return "num_items_in_batch" in inspect.signature(model.loss_function).parameters  # type: ignore[arg-type]


def labelled(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """Labels of a call, counted as Trainer counts those of the step: a causal LM shifts them. None without any."""
    labels = kwargs.get("shift_labels")
    if labels is None:
        given = {**dict(zip(inspect.signature(model.forward).parameters, args, strict=False)), **kwargs}
        labels = given.get("labels")
        if isinstance(labels, Tensor) and _shifts_labels(model):
            labels = labels[..., 1:]
    return (labels != -100).sum() if isinstance(labels, Tensor) else None


def _shifts_labels(model: nn.Module) -> bool:
    from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss

    is_causal = LOSS_MAPPING.get(model.loss_type) is ForCausalLMLoss
    return is_causal and not model.config.is_encoder_decoder  # type: ignore[union-attr]


def demand_use(output: Any, loss: Tensor, total: Tensor) -> None:
    """Raise in a backward pass that reaches ``output`` but has not come through ``total``.

    Args:
        output: What a model returns: a tensor, or a mapping or sequence of them.
        loss: The task's loss among them, which reaches ``total`` by itself.
        total: Its loss with the regularisers in it.
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
    # TRL's trainers, which say so, take their loss from other outputs than the model's.
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
    """A Hugging Face model's loss with the regularisers of its call, and their terms; None without any.

    Args:
        model: The model.
        loss: Its task's loss.
        output: All else that it returns: a backward pass from there alone raises.
        since: Number of the first forward pass of the call, 0 when compiled; see :func:`next_number`.
        num_items: Labelled tokens of the whole step, where the loss is a sum divided by them; else None.
        num_labels: Those of this call, scalar; None where they are not known.

    Returns:
        The loss to train on, and the terms, detached but for ``total``.
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
        # A loss may be of less precision than the model.
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
    """Every tensor of an output, hidden states and the like included."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, dict | list | tuple):
        for value in output.values() if isinstance(output, dict) else output:
            yield from _tensors(value)
