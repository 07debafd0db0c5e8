"""Arguments of transformers' Trainer, from the settings of a run."""

from pathlib import Path
from typing import Any, Protocol

import torch
from transformers import TrainingArguments

__all__ = ["EvaluatedSchedule", "Schedule", "evaluated_arguments", "training_arguments"]


class Schedule(Protocol):
    """The settings of a run that every task has, as its own class of settings describes them."""

    steps: int
    batch_size: int
    accumulation: int
    learning_rate: float
    warmup_steps: int
    weight_decay: float
    max_grad_norm: float
    precision: Any


def training_arguments(settings: Schedule, folder: Path, seed: int, *, every: int, **own: Any) -> TrainingArguments:
    """Trainer's arguments for a run.

    Args:
        settings: Of the run.
        folder: The run's own.
        seed: Of dropout and the order of examples.
        every: Steps between checkpoints, and evaluations.
        **own: Further arguments, which are the task's.

    Raises:
        ValueError: If several processes were launched.
    """
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=settings.steps,
        per_device_train_batch_size=settings.batch_size // settings.accumulation,
        gradient_accumulation_steps=settings.accumulation,
        learning_rate=settings.learning_rate,
        warmup_steps=settings.warmup_steps,
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        eval_steps=every,
        save_strategy="steps",
        save_steps=every,
        save_total_limit=2,
        # A loss that is not finite is a result, not to be replaced by the mean of those before.
        logging_nan_inf_filter=False,
        seed=seed,
        data_seed=seed,
        # Trainer takes half precision for a GPU's unless it is told.
        use_cpu=not torch.accelerator.is_available(),
        bf16=settings.precision == "bf16",
        fp16=settings.precision == "fp16",
        report_to="none",
        remove_unused_columns=False,
        dataloader_pin_memory=torch.cuda.is_available(),
        **own,
    )
    if arguments.world_size > 1:
        raise ValueError(f"a run of the lab takes one process, got a launch of {arguments.world_size}")
    # More GPUs would silently multiply the batch.
    arguments._n_gpu = min(1, arguments.n_gpu)
    return arguments


class EvaluatedSchedule(Schedule, Protocol):
    """The settings of a run that is evaluated as it trains, at a rate that falls along a cosine."""

    min_lr_ratio: float
    eval_every: int
    eval_batch_size: int


def evaluated_arguments(settings: EvaluatedSchedule, folder: Path, seed: int, **own: Any) -> TrainingArguments:
    """:func:`training_arguments` of a run that is evaluated every so many steps, and logs ten times as often."""
    return training_arguments(
        settings,
        folder,
        seed,
        every=settings.eval_every,
        eval_strategy="steps",
        logging_steps=max(1, settings.eval_every // 10),
        per_device_eval_batch_size=settings.eval_batch_size,
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": settings.min_lr_ratio},
        **own,
    )
