"""The regularisers under trainers that compute their loss outside the model."""

from typing import Any

import torch
from torch import nn

from torchdsc.losses import regularization

from .loss import base_of, is_pending, labelled


class RegularizedLoss:
    """Put before a Trainer that computes its loss outside the model, it adds the adapters' regularisers to it::

        class RegularizedSFTTrainer(RegularizedLoss, trl.SFTTrainer): ...

    Their weight against the task loss is that of a model that computes its own: sums over routed tokens divided by the
    labelled ones of the whole step where Trainer counts those, and means over a micro-batch where it does not.
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
        base = base_of(model)
        if not model.training or not is_pending(base):
            # Nothing is regularised, or the model has added the terms itself.
            return found
        loss, *outputs = found if return_outputs else (found,)
        share = None
        if num_items_in_batch is not None:
            precise = torch.promote_types(loss.dtype, torch.float32)
            share = labelled(base, (), given).to(precise) / num_items_in_batch
        total = regularization(model, num_tokens=num_items_in_batch, frame_share=share).total
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            # Trainer counts the labels of all processes, whose gradients are averaged.
            total = total * self.accelerator.num_processes
        loss = loss + total.to(loss.dtype)
        return (loss, *outputs) if return_outputs else loss
