"""Transformers' Trainer with the paper's parameter groups, and what the lab records beside the loss."""

import time
from typing import Any

from torch import nn
from torch.optim import AdamW, Optimizer
from transformers import Trainer
from transformers.trainer_callback import ProgressCallback

from torchdsc.diagnostics import RoutingMonitor
from torchdsc.nn import LinearRouter

__all__ = ["LabTrainer", "QuietProgress", "parameter_groups"]


def parameter_groups(
    model: nn.Module, *, learning_rate: float, weight_decay: float, router_lr_multiplier: float = 1.0
) -> list[dict[str, Any]]:
    """The paper's groups: routers at their own rate without decay, other matrices with decay, the rest without.

    Embeddings and gamma are not decayed.

    Args:
        model: The model.
        learning_rate: Base rate.
        weight_decay: Of matrices.
        router_lr_multiplier: Factor on the routers' rate.

    Returns:
        Groups for an optimizer; every trainable parameter is in exactly one.

    Raises:
        ValueError: If ``router_lr_multiplier`` is not positive.
    """
    if not router_lr_multiplier > 0:
        raise ValueError(f"router_lr_multiplier must be > 0, got {router_lr_multiplier}")
    routers = {id(p) for module in model.modules() if isinstance(module, LinearRouter) for p in module.parameters()}
    embeddings = {id(p) for module in model.modules() if isinstance(module, nn.Embedding) for p in module.parameters()}
    groups: dict[str, list[nn.Parameter]] = {"router": [], "decay": [], "no_decay": []}
    for parameter in model.parameters():
        if not parameter.requires_grad:
            continue
        if id(parameter) in routers:
            groups["router"].append(parameter)
        elif parameter.dim() >= 2 and id(parameter) not in embeddings:
            groups["decay"].append(parameter)
        else:
            groups["no_decay"].append(parameter)
    settings = {
        "router": {"lr": learning_rate * router_lr_multiplier, "weight_decay": 0.0},
        "decay": {"lr": learning_rate, "weight_decay": weight_decay},
        "no_decay": {"lr": learning_rate, "weight_decay": 0.0},
    }
    return [{"params": members, **settings[name]} for name, members in groups.items() if members]


class LabTrainer(Trainer):
    """Trainer with :func:`parameter_groups`, the task loss in its log, and routing counted at every evaluation.

    Args:
        router_lr_multiplier: Factor on the routers' learning rate.
        **kwargs: See ``Trainer``.
    """

    def __init__(self, *, router_lr_multiplier: float = 1.0, **kwargs: Any) -> None:
        self.router_lr_multiplier = router_lr_multiplier
        self.routing: list[dict[str, Any]] = []
        self._task_loss, self._task_steps = 0.0, 0
        self._started, self._before = time.perf_counter(), 0.0
        super().__init__(**kwargs)

    @property
    def seconds(self) -> float:
        """Seconds spent in this training so far, those before an interruption included."""
        return self._before + time.perf_counter() - self._started

    def create_optimizer(self, model: nn.Module | None = None) -> Optimizer:
        """AdamW over the parameter groups."""
        if self.optimizer is None:
            groups = parameter_groups(
                self.model if model is None else model,
                learning_rate=self.args.learning_rate,
                weight_decay=self.args.weight_decay,
                router_lr_multiplier=self.router_lr_multiplier,
            )
            betas = (self.args.adam_beta1, self.args.adam_beta2)
            self.optimizer = AdamW(groups, betas=betas, eps=self.args.adam_epsilon, fused=True)
        return self.optimizer

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, **kwargs: Any
    ) -> Any:
        """Trainer's loss; in training, the task loss is added up for the log."""
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **kwargs)
        if model.training and outputs.task_loss is not None:
            self._task_loss += float(outputs.task_loss)
            # A step's micro-batches add up to one loss, each divided by the tokens of the whole step.
            self._task_steps += 1
        return (loss, outputs) if return_outputs else loss

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train, with the clock running."""
        self._started = time.perf_counter()
        return super().train(*args, **kwargs)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add the mean task loss since the last log, and the time."""
        if self._before == 0.0 and self.state.log_history:
            # The first log after a resume: its history tells the time spent before.
            self._before = max(entry.get("seconds", 0.0) for entry in self.state.log_history)
        logs["seconds"] = self.seconds
        if "loss" in logs and self._task_steps:
            logs["task_loss"] = self._task_loss * self.args.gradient_accumulation_steps / self._task_steps
            self._task_loss, self._task_steps = 0.0, 0
        super().log(logs, *args, **kwargs)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Evaluate; mean routing over layers goes into the log."""
        with RoutingMonitor(self.model) as monitor:
            metrics: dict[str, float] = super().evaluate(*args, **kwargs)
        layers = monitor.layers()
        if layers:
            summary = {
                "utilization": sum(layer.utilization for layer in layers) / len(layers),
                "effective_atoms": sum(layer.effective_atoms for layer in layers) / len(layers),
            }
            gated = [layer for layer in layers if layer.strength is not None and layer.gate is not None]
            if gated:
                summary["strength"] = sum(layer.strength or 0.0 for layer in gated) / len(gated)
                summary["gate"] = sum(layer.gate or 0.0 for layer in gated) / len(gated)
            self.state.log_history[-1]["routing"] = summary
        self.routing = [layer.as_dict() for layer in layers]
        return metrics


class QuietProgress(ProgressCallback):
    """Trainer's progress bar with the loss beside it, in place of a line for each log."""

    def __init__(self, label: str) -> None:
        super().__init__()
        self.label = label
        self._shown: dict[str, str] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Open the bar, at the step that a resumed run starts from."""
        super().on_train_begin(args, state, control, **kwargs)
        if self.training_bar is not None:
            self.training_bar.set_description(self.label)
            self.training_bar.update(state.global_step)
            self.current_step = state.global_step

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Show the last losses."""
        for key, name in (("task_loss", "train"), ("eval_loss", "valid")):
            if logs and key in logs:
                self._shown[name] = f"{logs[key]:.3f}"
        if self.training_bar is not None:
            self.training_bar.set_postfix(self._shown)

    def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """No second bar for evaluations of seconds."""
