"""Diagnostics for transformers' Trainer, and those built on it, such as TRL's."""

from dataclasses import replace
from typing import Any

from torch import nn
from transformers import Trainer, TrainerCallback

from torchdsc.arguments import check_at_least, check_types

from .findings import exploding, findings, slow_path, warn
from .health import ModelHealth
from .measure import Diagnostics


class DiagnosticsCallback(TrainerCallback):
    """Measures the routed layers of a Trainer's model every so many steps, logs it, and warns of signs of failure.

    The numbers go through ``trainer.log``, and so to wherever it reports: TensorBoard, W&B, trackio::

        trainer.add_callback(DiagnosticsCallback(trainer))

    Each sign of failure raises one :class:`torchdsc.diagnostics.DiagnosticsWarning`. Works for DSCGPT, converted
    models and adapters. Under ``torch_compile`` no token is looked at.

    Args:
        trainer: The trainer, whose model has routed layers.
        every: Steps from one measurement to the next. The first step is measured too.
        per_layer: Whether to log each layer's numbers beside the means.
        max_keys: The most numbers logged at once.
        tokens: See :class:`Diagnostics`.

    Attributes:
        latest: The last measurement; None before the first.
        found: All findings so far, by code.

    Raises:
        TypeError: If an argument has another type.
        ValueError: If a number is out of its range, or the model has no routed layer.
    """

    def __init__(
        self, trainer: Trainer, *, every: int = 100, per_layer: bool = False, max_keys: int = 128, tokens: int = 64
    ) -> None:
        check_types(DiagnosticsCallback.__init__, locals())
        check_at_least(1, every=every, max_keys=max_keys)
        model = trainer.model
        if not isinstance(model, nn.Module):
            raise TypeError(f"trainer must have a model, got {type(model).__name__}")
        self._trainer, self._every, self._per_layer, self._max_keys = trainer, every, per_layer, max_keys
        self._diagnostics = Diagnostics(model, tokens=0 if trainer.args.torch_compile else tokens)
        self._history: list[ModelHealth] = []
        self._warned: set[str] = set()
        self._norms: list[float] = []
        self._measures = False

    @property
    def latest(self) -> ModelHealth | None:
        """The last measurement."""
        return self._history[-1] if self._history else None

    @property
    def found(self) -> tuple[str, ...]:
        """Codes of all findings so far."""
        return tuple(sorted(self._warned))

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Warn if layers are not composed by the fast path."""
        slow = slow_path(self._diagnostics.model)
        warn([slow] if slow else [], self._warned)

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Judge the norm of all gradients before clipping, which Trainer logs."""
        norm = (kwargs.get("logs") or {}).get("grad_norm")
        if isinstance(norm, float) and not self._was_skipped():
            found = exploding(norm, self._norms, " before clipping")
            warn([found] if found else [], self._warned)
            self._norms.append(norm)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Give up a measurement that an error has cut off."""
        self._diagnostics.drop()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Begin a measurement."""
        self._measures = self.is_due(state.global_step + 1)
        if self._measures:
            self._diagnostics.begin()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Read the gradients, as they are after clipping."""
        if self._measures:
            self._diagnostics.read_gradients()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """End the measurement, and tell of it."""
        if self._measures:
            self._measures = False
            health = self._diagnostics.end()
            self.tell(replace(health, gradient_norms={}) if self._was_skipped() else health)

    def _was_skipped(self) -> bool:
        """Whether the last step's float16 gradients overflowed, which only lowers their scale."""
        return bool(self._trainer.accelerator.optimizer_step_was_skipped)

    def is_due(self, step: int) -> bool:
        """Whether a step, counted from 1, is measured."""
        return (step - 1) % self._every == 0

    def tell(self, health: ModelHealth) -> None:
        """Log a measurement, and warn."""
        # After an interruption the first measurement is none of the start.
        history = self._history or ([health] if self._trainer.state.global_step > 1 else [])
        warn(findings(health, history), self._warned)
        self._history.append(health)
        control = self._trainer.control
        # A log takes back that Trainer is to log its loss at this step.
        should_log = control.should_log
        self._trainer.log(health.metrics(per_layer=self._per_layer, max_keys=self._max_keys))
        control.should_log = should_log
