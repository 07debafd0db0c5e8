"""How long runs would take here: a few steps and one evaluation of each kind are timed, in a temporary folder."""

import math
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

from rich.console import Console
from transformers import TrainerCallback, set_seed

from .budget import Plan
from .config import ExperimentConfig
from .environment import quiet_transformers
from .training import Data, build_model, build_trainer

__all__ = ["Cost", "Work", "duration", "measure_cost", "print_work"]

_STEPS = 4


@dataclass(frozen=True)
class Cost:
    """Seconds of a training step, and of an evaluated window."""

    step: float
    window: float

    def seconds(self, config: ExperimentConfig, steps: int, *, test: bool) -> float:
        """Of ``steps`` steps of a run with their evaluations, and of the test at its end."""
        evaluations = math.ceil(steps / config.eval_every) * config.eval_windows
        return steps * self.step + (evaluations + test * config.test_windows) * self.window


@dataclass(frozen=True)
class Work:
    """What is to be done under a name.

    Attributes:
        name: Of the method or variant.
        runs: How many there are.
        done: How many of them are finished already.
        seconds: What the rest takes.
    """

    name: str
    runs: int
    done: int
    seconds: float


def measure_cost(config: ExperimentConfig, plan: Plan, data: Data) -> Cost:
    """Time a run's steps and evaluation.

    One micro-batch is timed, whatever a step has of them, so that this takes seconds; what torch.compile takes at the
    start of a run is left out.

    Args:
        config: The experiment.
        plan: The method's widths.
        data: Corpus and tokens.

    Returns:
        The seconds on this machine, as loaded as it is now.
    """
    windows = min(config.eval_windows, config.eval_batch_size)
    batch = config.batch_size // config.accumulation
    short = replace(config, steps=_STEPS, warmup_steps=0, eval_every=_STEPS, eval_windows=windows)
    short = replace(short, batch_size=batch, accumulation=1)
    clock = _StepClock()
    with TemporaryDirectory() as folder, quiet_transformers():
        set_seed(config.seeds[0])
        model = build_model(short, plan, data.vocab_size)
        trainer = build_trainer(short, plan.method, model, config.seeds[0], data, Path(folder), f"timing {plan.method}")
        trainer.add_callback(clock)
        trainer.train()
        evaluation = next(entry for entry in trainer.state.log_history if "eval_runtime" in entry)
    # The first step makes the optimizer's state.
    return Cost(config.accumulation * median(clock.seconds[1:]), evaluation["eval_runtime"] / windows)


def print_work(console: Console, works: Iterable[Work], folder: Path) -> None:
    """Print what is to be done and about how long it takes, and that nothing was done."""
    works = list(works)
    for work in works:
        done = f", {work.done} of them done before" if work.done else ""
        runs = f"{work.runs} run{'s' if work.runs != 1 else ''}"
        left = f": about {duration(work.seconds)}" if work.done < work.runs else ""
        console.print(f"{work.name}: {runs}{done}{left}", markup=False, highlight=False, soft_wrap=True)
    seconds = sum(work.seconds for work in works)
    in_all = f"in all about {duration(seconds)} on this machine as it is now" if seconds else "nothing is left to train"
    console.print(f"{in_all}; a dry run: {folder} is left as it is", markup=False, highlight=False, soft_wrap=True)


def duration(seconds: float) -> str:
    """Seconds in words."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"


class _StepClock(TrainerCallback):
    """Seconds of each step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._since = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._since = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seconds.append(time.perf_counter() - self._since)
