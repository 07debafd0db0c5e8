"""Regularisers for trainers that compute the loss outside the model."""

from typing import Any

import torch
from torch import Tensor, nn

from torchdsc.nn import RoutedLayer

from .collection import regularization
from .host import is_pretrained, labelled


class RegularizedLoss:
    """Mixin that adds the regularisers to the loss of a Trainer that computes it outside the model::

        class RegularizedSFTTrainer(RegularizedLoss, trl.SFTTrainer): ...

    That is the case with label smoothing, ``compute_loss_func`` and TRL's trainers. If the trainer divides a sum of
    losses by the number of labelled tokens in the step, so are the regularisers, which are sums over routed tokens.
    Otherwise they are means over each micro-batch, averaged over the step. A model without regularisers is unaffected.
    """

    args: Any
    accelerator: Any

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """See Trainer."""
        given = dict(inputs)
        found = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)  # type: ignore[misc]
        if not model.training or not _waits(model):
            # There are no regularisers, or the model has added them itself.
            return found
        loss, *outputs = found if return_outputs else (found,)
        loss = loss + self._terms(model, given, num_items_in_batch, loss.dtype).to(loss.dtype)
        return (loss, *outputs) if return_outputs else loss

    def _terms(self, model: nn.Module, inputs: dict[str, Any], items: Any, dtype: torch.dtype) -> Tensor:
        is_scaled = self._loss_is_scaled(items)
        base = next((module for module in model.modules() if is_pretrained(module)), None)
        count = labelled(base, (), inputs) if base is not None and is_scaled and items is not None else None
        if count is None:
            total = regularization(model).total
            # The loss is already divided by the number of micro-batches.
            return total / self.current_gradient_accumulation_steps if is_scaled else total  # type: ignore[attr-defined]
        share = count.to(torch.promote_types(dtype, torch.float32)) / items
        total = regularization(model, num_tokens=items, frame_share=share).total
        if self.args.average_tokens_across_devices:
            # items counts the labels of all processes, but gradients are averaged over them.
            total = total * self.accelerator.num_processes
        return total

    def _loss_is_scaled(self, items: Any) -> bool:
        """Whether Trainer takes the loss of a micro-batch as its share of the step's loss."""
        stated: bool | None = getattr(self, "loss_is_scaled_for_ga", None)
        if stated is not None:
            return stated
        accepts = getattr(self, "model_accepts_loss_kwargs", False)
        return (accepts and items is not None) or getattr(self, "compute_loss_func", None) is not None


def _waits(model: nn.Module) -> bool:
    return any(isinstance(module, RoutedLayer) and module.statistics_log.waits() for module in model.modules())
