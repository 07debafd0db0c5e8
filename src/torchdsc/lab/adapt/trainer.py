"""Trainer with a learning rate for the head, and a log that carries a run's record over interruptions."""

import time
from pathlib import Path
from typing import Any, cast

from torch import nn
from torch.optim import Optimizer
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import TrainerCallback, TrainerState

from torchdsc.adapters import last_regularization
from torchdsc.lab.environment import peak_memory_bytes
from torchdsc.lab.trainer import GuardedTrainer
from torchdsc.optim import decay_parameter_names

from .methods import head_parameters

__all__ = ["HeadTrainer", "Notes", "noted"]


class Notes(TrainerCallback):
    """Keeps what a record needs in the log, which is part of checkpoints, so that it covers all calls so far."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.before = model, noted([])
        # When this call's training began; None while there is none.
        self.since: float | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Go on from what the checkpoint's log says."""
        self.before, self.since = noted(state.log_history), time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """A checkpoint holds a log up to its step."""
        if control.should_evaluate or control.should_save:
            control.should_log = True

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Add to the entry that was just made."""
        if self.since is not None:
            state.log_history[-1] |= {
                "train_seconds": self.before["train_seconds"] + time.perf_counter() - self.since,
                "peak_memory_bytes": max(self.before["peak_memory_bytes"], peak_memory_bytes()),
                "regularization": last_regularization(self.model),
            }

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Evaluations that follow are no training."""
        self.since = None


class HeadTrainer(GuardedTrainer):
    """Trainer with its own learning rate for the head, on the same schedule; it trains no step too many."""

    def __init__(self, head_learning_rate: float | None, **kwargs: Any) -> None:
        self._head_learning_rate = head_learning_rate
        super().__init__(**kwargs)

    def train(self, resume_from_checkpoint: str | None = None, **kwargs: Any) -> Any:
        """Train, or load a checkpoint of the last step as it is: Trainer would do another."""
        file = Path(resume_from_checkpoint or "", TRAINER_STATE_NAME)
        state = None if resume_from_checkpoint is None else TrainerState.load_from_json(str(file))
        if state is None or state.global_step < self.args.max_steps:
            return super().train(resume_from_checkpoint, **kwargs)
        self.state = state
        chosen = file.parent
        if self.args.load_best_model_at_end and state.best_model_checkpoint:
            # The folder may have been moved since.
            best = chosen.with_name(Path(state.best_model_checkpoint).name)
            chosen = best if best.is_dir() else chosen
        return self._load_from_checkpoint(str(chosen))

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Trainer's, without gamma and routers."""
        decayed = set(decay_parameter_names(model))
        return [name for name in super().get_decay_parameter_names(model) if name in decayed]

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Optimizer:
        """Trainer's, its groups divided."""
        optimizer: Optimizer = super().create_optimizer(*args, **kwargs)
        if self._head_learning_rate is not None:
            head = {id(parameter) for parameter in head_parameters(cast(nn.Module, self.model))}
            for group in list(optimizer.param_groups):
                own = [parameter for parameter in group["params"] if id(parameter) in head]
                group["params"] = [parameter for parameter in group["params"] if id(parameter) not in head]
                optimizer.add_param_group({**group, "params": own, "lr": self._head_learning_rate})
        return optimizer


def noted(history: list[dict[str, Any]]) -> dict[str, Any]:
    """What the log's last entry of training says of all calls."""
    none = {"train_seconds": 0.0, "peak_memory_bytes": 0, "regularization": {}}
    entry = next((entry for entry in reversed(history) if "train_seconds" in entry), none)
    return {name: entry[name] for name in none}
