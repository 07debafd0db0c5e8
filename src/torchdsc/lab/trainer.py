"""Transformers' Trainer with the paper's parameter groups, and what the lab records beside the loss."""

import math
import sys
import time
from pathlib import Path
from statistics import fmean
from typing import Any

from torch import nn
from torch.optim import Optimizer
from transformers import Trainer, TrainerCallback, TrainerControl
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import PrinterCallback, ProgressCallback, TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from torchdsc.diagnostics import LayerRouting, RoutingMonitor
from torchdsc.optim import DenseAndSparseAdam, build_optimizer, clip_grad_norm

from .environment import peak_memory_bytes
from .files import naming_writes

__all__ = ["DivergedError", "GuardedTrainer", "LabTrainer", "QuietProgress", "show_progress"]


class DivergedError(ArithmeticError):
    """A training loss is not finite, which no later step can mend.

    Attributes:
        step: The step with that loss, counted from 1.
        loss: NaN or an infinity.
    """

    def __init__(self, step: int, loss: float) -> None:
        super().__init__(f"the loss was {loss} at step {step}")
        self.step, self.loss = step, loss


class GuardedTrainer(Trainer):
    """Trainer that stops if its loss is not finite, and names files that it could not write."""

    control: TrainerControl

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, **kwargs: Any
    ) -> Any:
        """Trainer's.

        Raises:
            DivergedError: If the loss of a training step is not finite.
        """
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **kwargs)
        if model.training and not math.isfinite(loss.detach()):
            raise DivergedError(self.state.global_step + 1, float(loss.detach()))
        return (loss, outputs) if return_outputs else loss

    def train(self, resume_from_checkpoint: str | None = None, **kwargs: Any) -> Any:
        """Trainer's.

        Raises:
            DivergedError: If the loss of a step is not finite.
            OSError: If a checkpoint cannot be written.
        """
        try:
            return super().train(resume_from_checkpoint, **kwargs)
        except (DivergedError, OSError):
            # As at the normal end of training, so that progress bars are closed.
            self.control = self.callback_handler.on_train_end(self.args, self.state, self.control)
            raise

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        with naming_writes(Path(self.args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"):
            super()._save_checkpoint(*args, **kwargs)


class LabTrainer(GuardedTrainer):
    """Trainer with :func:`torchdsc.parameter_groups`, whose log has what a run's record needs.

    Beside transformers' entries the log has the task loss without regularisers, the seconds of training (without
    evaluations), the peak memory so far, and the routing at every evaluation. The log is part of a checkpoint, so that
    all of these continue after an interruption.

    Args:
        router_lr_multiplier: Factor on the routers' learning rate.
        atom_lr_multiplier: Factor on that of the banks' atoms.
        **kwargs: See ``Trainer``.
    """

    optimizer: Optimizer | None

    def __init__(self, *, router_lr_multiplier: float = 1.0, atom_lr_multiplier: float = 1.0, **kwargs: Any) -> None:
        self.router_lr_multiplier, self.atom_lr_multiplier = router_lr_multiplier, atom_lr_multiplier
        self._task_loss, self._task_steps = 0.0, 0
        self._seconds = 0.0
        # When the clock was started; None while it stands.
        self._since: float | None = None
        self._peak_before = 0
        super().__init__(**kwargs)
        self.add_callback(_LogBeforeCheckpoint())

    @property
    def seconds(self) -> float:
        """Seconds spent in training so far, those before an interruption included."""
        return self._seconds + (0.0 if self._since is None else time.perf_counter() - self._since)

    @property
    def peak_memory_bytes(self) -> int:
        """Peak memory so far, that before an interruption included."""
        return max(self._peak_before, peak_memory_bytes())

    @property
    def routing(self) -> list[dict[str, Any]]:
        """Routing of each layer at the last evaluation."""
        layers: list[dict[str, Any]] = next(
            (entry["routing_layers"] for entry in reversed(self.state.log_history) if "routing_layers" in entry), []
        )
        return layers

    def create_optimizer(self, model: nn.Module | None = None) -> Optimizer:
        """AdamW over the parameter groups, and SparseAdam for banks with row-sparse gradients."""
        if self.optimizer is None:
            self.optimizer = build_optimizer(
                self.model if model is None else model,
                learning_rate=self.args.learning_rate,
                weight_decay=self.args.weight_decay,
                router_lr_multiplier=self.router_lr_multiplier,
                atom_lr_multiplier=self.atom_lr_multiplier,
                betas=(self.args.adam_beta1, self.args.adam_beta2),
                eps=self.args.adam_epsilon,
            )
        return self.optimizer

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        """Trainer's clipping, which knows dense gradients alone."""
        if not isinstance(getattr(self.optimizer, "optimizer", self.optimizer), DenseAndSparseAdam):
            return super()._clip_grad_norm(model)
        return clip_grad_norm(model.parameters(), self.args.max_grad_norm)

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

    def train(self, resume_from_checkpoint: str | None = None, **kwargs: Any) -> Any:
        """Train, with the clock running on from the checkpoint's."""
        history: list[dict[str, Any]] = []
        if resume_from_checkpoint is not None:
            history = TrainerState.load_from_json(str(Path(resume_from_checkpoint) / TRAINER_STATE_NAME)).log_history
        self._seconds = max((entry.get("seconds", 0.0) for entry in history), default=0.0)
        self._peak_before = max((entry.get("peak_memory_bytes", 0) for entry in history), default=0)
        self._since = time.perf_counter()
        try:
            return super().train(resume_from_checkpoint, **kwargs)
        finally:
            self._seconds, self._since = self.seconds, None

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add the mean task loss since the last log, the time and the peak memory."""
        logs["seconds"] = self.seconds
        logs["peak_memory_bytes"] = self.peak_memory_bytes
        if "loss" in logs and self._task_steps:
            logs["task_loss"] = self._task_loss * self.args.gradient_accumulation_steps / self._task_steps
            self._task_loss, self._task_steps = 0.0, 0
        super().log(logs, *args, **kwargs)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Evaluate, with the clock stopped. The log gets the routing, averaged over layers.

        The routing of each layer is only kept for the last evaluation.
        """
        runs = self._since is not None
        self._seconds, self._since = self.seconds, None
        with RoutingMonitor(self.model) as monitor:
            metrics: dict[str, float] = super().evaluate(*args, **kwargs)
        if runs:
            self._since = time.perf_counter()
        layers = monitor.layers()
        if layers:
            for entry in self.state.log_history:
                entry.pop("routing_layers", None)
            self.state.log_history[-1] |= {
                "routing": _mean_routing(layers),
                "routing_layers": [layer.as_dict() for layer in layers],
            }
        return metrics


def _mean_routing(layers: list[LayerRouting]) -> dict[str, float]:
    summary = {
        "utilization": fmean(layer.utilization for layer in layers),
        "effective_atoms": fmean(layer.effective_atoms for layer in layers),
    }
    gated = [layer for layer in layers if layer.strength is not None and layer.gate is not None]
    if gated:
        summary["strength"] = fmean(layer.strength or 0.0 for layer in gated)
        summary["gate"] = fmean(layer.gate or 0.0 for layer in gated)
    return summary


class _LogBeforeCheckpoint(TrainerCallback):
    """Logs before every checkpoint, so that a resumed run logs over the same intervals as one without interruption."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if control.should_evaluate or control.should_save:
            control.should_log = True


def show_progress(trainer: Trainer, label: str) -> None:
    """Replace Trainer's output by :class:`QuietProgress` on a terminal, and by nothing elsewhere."""
    trainer.remove_callback(ProgressCallback)
    trainer.remove_callback(PrinterCallback)
    if sys.stderr.isatty():
        trainer.add_callback(QuietProgress(label))


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
            # Not by update(), for which steps of an earlier call would count as very fast ones.
            self.training_bar.initial = self.training_bar.n = state.global_step
            self.training_bar.refresh()
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
