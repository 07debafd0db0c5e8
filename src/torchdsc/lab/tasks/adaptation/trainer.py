"""Trainer with a learning rate for the head."""

from typing import Any

from torch import nn
from torch.optim import Optimizer

from torchdsc.lab.training.trainer import LabTrainer
from torchdsc.optim import decay_parameter_names

from .methods import head_parameters

__all__ = ["HeadTrainer"]


class HeadTrainer(LabTrainer):
    """Trainer with its own learning rate for the head, on the same schedule.

    Args:
        head_learning_rate: None for the same as for all.
        **kwargs: See :class:`LabTrainer`.
    """

    def __init__(self, *, head_learning_rate: float | None, **kwargs: Any) -> None:
        self._head_learning_rate = head_learning_rate
        super().__init__(**kwargs)

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
