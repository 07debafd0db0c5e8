"""Trainer with what adaptations ask for: a learning rate for the head, and adapters that are quiet on old text."""

from collections.abc import Sequence
from random import Random
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from torchdsc.adapters import signal_strength
from torchdsc.lab.training.trainer import LabTrainer
from torchdsc.optim import decay_parameter_names

from .methods import head_parameters

__all__ = ["AdaptationTrainer"]


class AdaptationTrainer(LabTrainer):
    """Trainer with a learning rate for the head, on the same schedule, and a term for quiet adapters on old text.

    Args:
        head_learning_rate: None for the same as for all.
        quiet: Weight of the signal strength on old text.
        old_texts: Blocks of each, with "input_ids" of shape (length,).
        **kwargs: See :class:`LabTrainer`.
    """

    def __init__(
        self,
        *,
        head_learning_rate: float | None,
        quiet: float = 0.0,
        old_texts: Sequence[Sequence[dict[str, Any]]] = (),
        **kwargs: Any,
    ) -> None:
        self._head_learning_rate, self._quiet, self._old_texts = head_learning_rate, quiet, old_texts
        super().__init__(**kwargs)

    def compute_loss(self, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Trainer's, in training with the term."""
        result = super().compute_loss(model, *args, **kwargs)
        if not self._quiet or not model.training:
            return result
        # By the step alone, so that an interrupted run goes on with the same blocks.
        random = Random(f"{self.args.seed} {self.state.global_step}")
        texts = random.choices(self._old_texts, k=self.args.per_device_train_batch_size)
        blocks = [random.choice(text) for text in texts]
        ids = torch.stack([block["input_ids"] for block in blocks]).to(self.args.device)
        term = self._quiet * signal_strength(self.accelerator.unwrap_model(model), ids)
        if self.model_accepts_loss_kwargs:
            # Trainer adds the micro-batches of a step up, without a division.
            term = term / self.args.gradient_accumulation_steps
        loss, *others = result if isinstance(result, tuple) else (result,)
        return (loss + term, *others) if others else loss + term

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Trainer's, without gamma and routers."""
        decayed = set(decay_parameter_names(model))
        return [name for name in super().get_decay_parameter_names(model) if name in decayed]

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Optimizer:
        """Trainer's, its groups divided."""
        optimizer: Optimizer = super().create_optimizer(*args, **kwargs)
        if self._head_learning_rate is not None:
            head = {id(parameter) for parameter in head_parameters(self.model)}
            for group in list(optimizer.param_groups):
                own = [parameter for parameter in group["params"] if id(parameter) in head]
                group["params"] = [parameter for parameter in group["params"] if id(parameter) not in head]
                optimizer.add_param_group({**group, "params": own, "lr": self._head_learning_rate})
        return optimizer
