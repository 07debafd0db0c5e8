"""Transformers' Trainer as every run takes it: what its log has for a run's record."""

import math
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import Trainer, TrainerCallback, TrainerControl
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import PrinterCallback, ProgressCallback, TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from torchdsc.diagnostics import DiagnosticsCallback, ModelHealth, RoutingMonitor, findings
from torchdsc.diagnostics.routing import shared
from torchdsc.lab.files import naming_writes
from torchdsc.losses import last_regularization
from torchdsc.nn import RoutedLayer
from torchdsc.optim import clip_grad_norm

from .environment import peak_memory_bytes
from .progress import QuietProgress

__all__ = ["DivergedError", "LabTrainer"]

# Tokens of an evaluation whose selections are compared with those of the evaluation before.
_FOLLOWED = 64
# Where the log keeps them.
_SELECTED = "routing_selected"
# What records have of a layer's routing in the evaluation.
_ROUTING = ("utilization", "effective_atoms", "strength", "gate")
# And of its sensitivity; the others they have under other names.
_SENSITIVITY = ("local_lipschitz", "changed", "jump", "noise_strength", "noise_gate", "noise_norm")


class DivergedError(ArithmeticError):
    """A loss is not finite, which no later step can mend.

    Attributes:
        step: The step with that loss, counted from 1.
        loss: NaN or an infinity.
    """

    def __init__(self, step: int, loss: float) -> None:
        super().__init__(f"the loss was {loss} at step {step}")
        self.step, self.loss = step, loss


class LabTrainer(Trainer):
    """Trainer whose log has what a run's record needs, and that stops if its loss is not finite.

    Beside transformers' entries the log has the task loss without regularisers or, for adapters, the regularisers; the
    seconds of training (without evaluations), the peak memory so far, and the routing at every evaluation, with what
    :class:`torchdsc.diagnostics.Diagnostics` says of the step before it, and how much of the selections the evaluation
    before had too (``kept``). The log is part of a checkpoint, so that all
    of these continue after an interruption. Files that cannot be written are named.

    Args:
        label: What the progress bar says, which is there on a terminal alone.
        **kwargs: See ``Trainer``.

    Attributes:
        label: The same.
        health: What was measured at the step before the next evaluation, by name; empty where no step was.
        has_task_loss: Whether the model tells the task loss; known from the first step on.
    """

    control: TrainerControl
    model: nn.Module
    optimizer: Optimizer | None

    def __init__(self, label: str, **kwargs: Any) -> None:
        self.label = label
        self.has_task_loss = False
        self._task_loss, self._task_steps = 0.0, 0
        self._seconds = 0.0
        # When the clock was started; None while it stands.
        self._since: float | None = None
        self._peak_before = 0
        self.health: dict[str, Any] = {}
        super().__init__(**kwargs)
        self.add_callback(_LogBeforeCheckpoint())
        if any(isinstance(module, RoutedLayer) for module in self.model.modules()):
            self.add_callback(_MeasureHealth(self))
        self.remove_callback(ProgressCallback)
        self.remove_callback(PrinterCallback)
        if sys.stderr.isatty():
            self.add_callback(QuietProgress(label))

    @property
    def seconds(self) -> float:
        """Seconds spent in training so far, those before an interruption included."""
        return self._seconds + (0.0 if self._since is None else time.perf_counter() - self._since)

    @property
    def peak_memory_bytes(self) -> int:
        """Peak memory so far, that before an interruption included."""
        return max(self._peak_before, peak_memory_bytes())

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, **kwargs: Any
    ) -> Any:
        """Trainer's loss; in training, the task loss is added up for the log.

        Raises:
            DivergedError: If the loss of a training step is not finite.
        """
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **kwargs)
        if model.training:
            task_loss = getattr(outputs, "task_loss", None)
            self.has_task_loss = task_loss is not None
            self._check(self.state.global_step + 1, float(loss.detach()))
            if task_loss is not None:
                self._task_loss += float(task_loss)
                self._task_steps += 1
        return (loss, outputs) if return_outputs else loss

    def train(self, resume_from_checkpoint: str | None = None, **kwargs: Any) -> Any:
        """Train, with the clock running on from the checkpoint's; one of the last step is loaded as it is.

        Raises:
            DivergedError: If the loss of a step, or of the evaluation after the last one, is not finite.
            OSError: If a checkpoint cannot be written.
        """
        state = TrainerState()
        if resume_from_checkpoint is not None:
            state = TrainerState.load_from_json(str(Path(resume_from_checkpoint) / TRAINER_STATE_NAME))
        self._seconds = max((entry.get("seconds", 0.0) for entry in state.log_history), default=0.0)
        self._peak_before = max((entry.get("peak_memory_bytes", 0) for entry in state.log_history), default=0)
        if resume_from_checkpoint is not None and state.global_step >= self.args.max_steps:
            # Trainer would do another step.
            return self._load_finished(Path(resume_from_checkpoint), state)
        self._since = time.perf_counter()
        try:
            return super().train(resume_from_checkpoint, **kwargs)
        except (DivergedError, OSError):
            # As at the normal end of training, so that progress bars are closed.
            self.control = self.callback_handler.on_train_end(self.args, self.state, self.control)
            raise
        finally:
            self._seconds, self._since = self.seconds, None

    def log(self, logs: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        """Add the mean task loss since the last log, the last regularisers, the time and the peak memory."""
        logs["seconds"] = self.seconds
        logs["peak_memory_bytes"] = self.peak_memory_bytes
        if "loss" in logs and self._task_steps:
            # A step's micro-batches add up to one loss, each divided by the tokens of the whole step, or are averaged.
            parts = self.args.gradient_accumulation_steps if self.model_accepts_loss_kwargs else 1
            logs["task_loss"] = self._task_loss * parts / self._task_steps
            self._task_loss, self._task_steps = 0.0, 0
        terms = last_regularization(self.model)
        super().log(logs | ({"regularization": terms} if terms else {}), *args, **kwargs)

    def evaluate(self, eval_dataset: Any = None, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Evaluate, with the clock stopped. The log gets the routing, averaged over layers.

        The routing of each layer is only kept for the last evaluation.

        Raises:
            DivergedError: If it is the one after the last step of training, and its loss is not finite.
        """
        trains = self._since is not None
        with self.clock_stopped(), RoutingMonitor(self.model, tokens=_FOLLOWED) as monitor:
            metrics: dict[str, float] = super().evaluate(eval_dataset, *args, **kwargs)
        layers = [layer.as_dict() for layer in monitor.layers()]
        if layers:
            for entry in self.state.log_history:
                entry.pop("routing_layers", None)
            # Told once.
            health, self.health = self.health, {}
            kept = self._compare(monitor.selections()) if eval_dataset is None else {}
            self.state.log_history[-1] |= {
                "routing": health | kept | _means(layers, _ROUTING) | {"histogram": _mean_histogram(layers)},
                "routing_layers": layers,
            }
        if trains and self.state.global_step >= self.args.max_steps:
            self._check(self.state.global_step, metrics["eval_loss"])
        return metrics

    @contextmanager
    def clock_stopped(self) -> Iterator[None]:
        """For what is none of the training."""
        trains = self._since is not None
        self._seconds, self._since = self.seconds, None
        try:
            yield
        finally:
            self._since = time.perf_counter() if trains else None

    def _compare(self, selections: list[Tensor]) -> dict[str, float]:
        """Selections of the same tokens with those of the evaluation before, which the log has."""
        before = [entry.pop(_SELECTED) for entry in self.state.log_history if _SELECTED in entry]
        self.state.log_history[-1][_SELECTED] = [selected.tolist() for selected in selections]
        if not before:
            return {}
        pairs = zip(selections, map(torch.tensor, before[-1]), strict=True)
        return {"kept": fmean(shared(now, earlier) for now, earlier in pairs)}

    def _check(self, step: int, loss: float) -> None:
        if not math.isfinite(loss):
            raise DivergedError(step, loss)

    def _load_finished(self, checkpoint: Path, state: TrainerState) -> None:
        """Take up the state of a checkpoint, and its weights or those of the best one."""
        self.state = state
        if self.args.load_best_model_at_end and state.best_model_checkpoint:
            # The folder may have been moved since.
            best = checkpoint.with_name(Path(state.best_model_checkpoint).name)
            checkpoint = best if best.is_dir() else checkpoint
        self._load_from_checkpoint(str(checkpoint))

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        """Trainer's clipping, which knows dense gradients alone."""
        if not any(p.grad is not None and p.grad.is_sparse for p in model.parameters()):
            return super()._clip_grad_norm(model)
        return clip_grad_norm(model.parameters(), self.args.max_grad_norm)

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        with naming_writes(Path(self.args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"):
            super()._save_checkpoint(*args, **kwargs)


def _means(layers: Iterable[dict[str, Any]], names: Sequence[str]) -> dict[str, float]:
    """Of figures over the layers that have them: not all have a gate."""
    known = list(layers)
    found = {name: [layer[name] for layer in known if layer[name] is not None] for name in names}
    return {name: fmean(values) for name, values in found.items() if values}


def _mean_histogram(layers: Iterable[dict[str, Any]]) -> list[float]:
    """Of loads, over layers."""
    return [fmean(shares) for shares in zip(*(layer["histogram"] for layer in layers), strict=True)]


class _MeasureHealth(DiagnosticsCallback):
    """Measures the routed layers around each step that an evaluation follows, for the trainer's log."""

    def __init__(self, trainer: LabTrainer) -> None:
        super().__init__(trainer)
        self._lab = trainer
        self._sensitivity: dict[str, float] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Nothing: runs may ask for any implementation."""

    def is_due(self, step: int) -> bool:
        arguments = self._lab.args
        return step % max(1, int(arguments.eval_steps or 1)) == 0 or step == arguments.max_steps

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not self._measures:
            return
        with self._lab.clock_stopped():
            found = self._diagnostics.sensitivities().values()
            self._sensitivity = _means((each.as_dict() for each in found), _SENSITIVITY)
            super().on_step_end(args, state, control, **kwargs)

    def tell(self, health: ModelHealth) -> None:
        told: dict[str, Any] = health.means() | self._sensitivity
        # What has been selected ever is known since the last interruption alone.
        told.pop("unused", None)
        # The gate at the start is no matter of a later step; any history says that there were steps before.
        found = findings(health, [health])
        self._lab.health = told | ({"findings": [finding.code for finding in found]} if found else {})


class _LogBeforeCheckpoint(TrainerCallback):
    """Logs before every checkpoint, so that a resumed run logs over the same intervals as one without interruption."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if control.should_evaluate or control.should_save:
            control.should_log = True
