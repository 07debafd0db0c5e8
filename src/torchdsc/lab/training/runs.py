"""What a run does around its trainer, whatever its task: its record, going on, and what the log says of it."""

import logging
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

from transformers import TrainingArguments, set_seed

from torchdsc.lab.files import new_folder, read_json, remove_drafts, write_json
from torchdsc.lab.schema import Model

from .checkpoints import last_checkpoint, remove_checkpoints
from .environment import provenance, quiet_transformers
from .trainer import DivergedError, LabTrainer

__all__ = ["RECORD", "evaluated_steps", "evaluations", "fit", "measure_pace", "recorded", "routing_of", "summary"]

RECORD = "record.json"
# What tables and reports are made from, of runs of any task.
_REQUIRED = (
    *("method", "seed", "description", "steps", "diverged_at_step", "curve", "train_curve", "routing"),
    *("train_seconds", "peak_memory_bytes", "config", "data", "versions", "hardware", "commit", "command"),
)
_TRAIN_KEYS = ("step", "loss", "task_loss", "grad_norm")
History = list[dict[str, Any]]

_logger = logging.getLogger(__name__)


def recorded(folder: Path, make: Callable[[], dict[str, Any]], *, keys: Iterable[str]) -> dict[str, Any]:
    """The record of the finished run in a folder, or else the one that ``make`` returns, which is written there.

    Args:
        folder: The run's own. Checkpoints in it are removed once there is a record.
        make: Trains, with transformers' messages held back.
        keys: What the record must have, beside what those of all tasks have.

    Raises:
        ValueError: If the record is damaged.
        OSError: If the folder cannot be written, as on a full disk.
    """
    file = folder / RECORD
    if file.is_file():
        record = read_json(file, keys=(*_REQUIRED, *keys))
    else:
        with new_folder(folder), quiet_transformers():
            remove_drafts(folder)
            record = make()
        write_json(file, record)
    # A kill may have come between a record and their removal.
    remove_checkpoints(folder)
    return record


def fit(trainer: LabTrainer) -> DivergedError | None:
    """Train from the last checkpoint to the last step; returns what ended the run before, and warns of it.

    Raises:
        ValueError: If no checkpoint that is there is whole.
        KeyboardInterrupt: If a callback stopped the training; a later call goes on from the last checkpoint.
    """
    checkpoint = last_checkpoint(Path(trainer.args.output_dir))
    try:
        trainer.train(None if checkpoint is None else str(checkpoint))
    except DivergedError as error:
        _logger.warning("%s diverged: %s of %s", trainer.label, error, _advice(trainer.args))
        # Without its traceback, which holds the step's graph.
        return error.with_traceback(None)
    if trainer.state.global_step < trainer.args.max_steps:
        raise KeyboardInterrupt(f"stopped at step {trainer.state.global_step} of {trainer.args.max_steps}")
    return None


def _advice(arguments: TrainingArguments) -> str:
    cures = [f"a learning_rate below {arguments.learning_rate:g}"]
    if arguments.warmup_steps < arguments.max_steps:
        cures.append(f"more warmup_steps than {arguments.warmup_steps}")
    if arguments.bf16 or arguments.fp16:
        cures.append("precision fp32")
    return f"{arguments.max_steps}, and it stopped there. Try {' or '.join(cures)}, in another folder"


def summary(trainer: LabTrainer, settings: Model, diverged: DivergedError | None) -> dict[str, Any]:
    """What a record says of its training, the seconds and memory of all calls among it, and what it depends on.

    Args:
        trainer: After :func:`fit`.
        settings: Of the run.
        diverged: What fit returned.
    """
    history = trainer.state.log_history
    points = [{key: entry[key] for key in _TRAIN_KEYS if key in entry} for entry in history if "loss" in entry]
    if diverged is not None:
        losses = ("loss", "task_loss") if trainer.has_task_loss else ("loss",)
        points.append({"step": diverged.step, **dict.fromkeys(losses, diverged.loss)})
    return {
        "steps": trainer.args.max_steps,
        "diverged_at_step": None if diverged is None else diverged.step,
        "train_curve": points,
        "train_seconds": trainer.seconds,
        "peak_memory_bytes": trainer.peak_memory_bytes,
        "config": settings.model_dump(),
        **provenance(),
    }


def evaluated_steps(steps: int, every: int) -> list[int]:
    """The steps of a run that an evaluation follows: every so many, and the last."""
    return list(dict.fromkeys([*range(every, steps + 1, every), steps]))


def evaluations(history: History, steps: Iterable[int]) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """The log's entry at each of the steps: curves of a comparison have the same ones.

    An entry is NaN in all it is asked for where there is none, because a run diverged before.
    """
    found = {entry["step"]: entry for entry in history if "eval_loss" in entry}
    for step in steps:
        yield step, found.get(step, defaultdict(lambda: math.nan))


def routing_of(history: History) -> dict[str, Any] | None:
    """Means over layers at each evaluation of a log, and each layer at the last one; None if nothing is routed."""
    layers = next((entry["routing_layers"] for entry in reversed(history) if "routing_layers" in entry), None)
    means = {entry["step"]: entry["routing"] for entry in history if "routing" in entry}
    return layers and {"history": [{"step": step, **mean} for step, mean in means.items()], "layers": layers}


def measure_pace(build: Callable[[Path], LabTrainer]) -> tuple[float, float]:
    """Seconds of a step of training here, and of an evaluation, as loaded as the machine is now.

    Args:
        build: Makes the trainer of a few steps in a temporary folder, with few examples to evaluate.
    """
    with TemporaryDirectory() as folder, quiet_transformers():
        set_seed(0)
        trainer = build(Path(folder))
        trainer.args.set_save(strategy="no")
        trainer.args.set_evaluate(strategy="no")
        trainer.args.logging_steps = 1
        trainer.train()
        evaluation = trainer.evaluate()["eval_runtime"]
        seconds = [entry["seconds"] for entry in trainer.state.log_history if "loss" in entry]
    # From the first step on, which makes the optimizer's state.
    return median(after - before for before, after in pairwise(seconds)), evaluation
