"""A progress bar of training that says a run's name and its last losses."""

from typing import Any

from transformers.trainer_callback import ProgressCallback

__all__ = ["QuietProgress"]


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
        for key, name in (("loss", "train"), ("task_loss", "train"), ("eval_loss", "valid")):
            if logs and key in logs:
                self._shown[name] = f"{logs[key]:.3f}"
        if self.training_bar is not None:
            self.training_bar.set_postfix(self._shown)

    def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """No second bar for evaluations of seconds."""
