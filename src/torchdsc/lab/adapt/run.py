"""One adaptation: a base model, a method, a task, a learning rate and a seed, to a record."""

import logging
import math
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from torch import nn
from transformers import PreTrainedTokenizerBase, Trainer, TrainingArguments, set_seed

from torchdsc.lab.checkpoints import last_checkpoint, remove_checkpoints
from torchdsc.lab.environment import (
    command_line,
    commit,
    hardware,
    quiet_transformers,
    reset_peak_memory,
    versions,
)
from torchdsc.lab.files import naming_writes, new_folder, write_json
from torchdsc.lab.queue import read_record
from torchdsc.lab.trainer import DivergedError, show_progress

from .config import AdaptConfig, Method
from .data import TaskData
from .methods import adapter_parameters, build_model
from .metrics import score
from .trainer import HeadTrainer, Notes, noted

__all__ = ["RECORD", "Job", "adapt_run"]

_logger = logging.getLogger(__name__)

RECORD, WEIGHTS = "record.json", "adapter"
# What tables and reports are made from.
_FIELDS = {
    **dict.fromkeys(("task", "method", "commit", "command"), str),
    **dict.fromkeys(("config", "versions", "hardware"), dict),
    **dict.fromkeys(("score", "loss", "learning_rate", "train_seconds"), int | float),
    **dict.fromkeys(("seed", "steps", "params_adapter", "params_trainable"), int),
    **dict.fromkeys(("data_sha256", "curve"), list),
}
# Settings of a study that a single run does not depend on.
_NOT_OF_A_RUN = ("reference", "learning_rates", "tuning_tasks", "tuning_seed", "timing_rounds")


@dataclass(frozen=True)
class Job:
    """One run of a study.

    Attributes:
        task: Name of the task.
        method: With its size.
        learning_rate: Peak of the schedule.
        seed: Of the head, the adapter, the order of examples and dropout.
        is_trial: Whether it is scored on held-out examples of train, for tuning, and its weights are not kept.
    """

    task: str
    method: Method
    learning_rate: float
    seed: int
    is_trial: bool

    @property
    def name(self) -> str:
        """Name of the run's folder."""
        phase = "trial" if self.is_trial else "run"
        name = f"{phase}-{self.task}-{self.method.name}-lr{self.learning_rate:g}-seed{self.seed}"
        return re.sub(r"[^\w.+-]+", "_", name)

    @property
    def description(self) -> str:
        """The run in words, which tell it apart from any other."""
        rate = f"method {self.method.name!r} at learning rate {self.learning_rate!r} on task {self.task!r}"
        return f"{'trial' if self.is_trial else 'run'} of {rate}, seed {self.seed}"


def adapt_run(
    config: AdaptConfig, job: Job, data: TaskData, tokenizer: PreTrainedTokenizerBase, folder: Path, label: str
) -> dict[str, Any]:
    """Adapt, or go on where it stopped, or return what a finished run recorded.

    The folder ends with ``record.json``, and but for trials with the adapter (or model) and its tokenizer.

    Args:
        config: The study.
        job: What to do.
        data: Of the job's task.
        tokenizer: Of the base model.
        folder: The run's own folder.
        label: What the progress bar says.

    Returns:
        The record.

    Raises:
        ValueError: If the record is damaged, or that of another run.
        KeyboardInterrupt: If the training was stopped; a later call goes on from the last checkpoint.
    """
    file = folder / RECORD
    if file.is_file():
        record = read_record(file, _FIELDS if job.is_trial else {**_FIELDS, "adapter_bytes": int})
        _check_record(record, config, job, data, file)
        remove_checkpoints(folder)
        return record
    with new_folder(folder), quiet_transformers():
        record = _adapt(config, job, data, tokenizer, folder, label)
    write_json(file, record)
    remove_checkpoints(folder)
    return record


def _check_record(record: dict[str, Any], config: AdaptConfig, job: Job, data: TaskData, file: Path) -> None:
    """A record under a run's name must be that of this very run."""
    kept = record["config"]
    method = kept["method"] if isinstance(kept.get("method"), dict) else {}
    wanted = {name: value for name, value in _settings(config).items() if name not in _NOT_OF_A_RUN}
    wanted |= {"task": asdict(data.task), "kind": job.method.kind, "options": job.method.options}
    kept = {**kept, "kind": method.get("kind"), "options": method.get("options")}
    different = [name for name in wanted if kept.get(name) != wanted[name]]
    if different or record["data_sha256"] != data.sha256:
        what = f"{different[0]} {kept.get(different[0])!r}" if different else "other data"
        raise ValueError(f"{file} must be a record of this study, got one of {what}: delete its folder to run it anew")


def _adapt(
    config: AdaptConfig, job: Job, data: TaskData, tokenizer: PreTrainedTokenizerBase, folder: Path, label: str
) -> dict[str, Any]:
    set_seed(job.seed)
    reset_peak_memory()
    model = build_model(job.method, config, data, tokenizer.pad_token_id)
    trainer = _trainer(config, job, data, model, folder, label)
    retained = None if data.retain is None or job.is_trial else _loss(trainer, data.retain)
    diverged = _fit(trainer, job, folder, label)
    metrics = {"score": math.nan, "loss": math.nan}
    if diverged is None:
        metrics = _evaluate(trainer, data, data.validation if job.is_trial else data.evaluation)
    if retained is not None and data.retain is not None:
        after = _loss(trainer, data.retain) if diverged is None else math.nan
        metrics |= {"retain_loss_before": retained, "retain_loss_after": after}
    record = {
        "task": job.task,
        "method": job.method.name,
        "kind": job.method.kind,
        "learning_rate": job.learning_rate,
        "seed": job.seed,
        "is_trial": job.is_trial,
        "metric": data.task.scored_by,
        **metrics,
        "params_adapter": adapter_parameters(model),
        "params_trainable": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "steps": trainer.state.max_steps,
        "diverged_at_step": None if diverged is None else diverged.step,
        "curve": _curve(trainer),
        **noted(trainer.state.log_history),
        "config": {**_settings(config), "task": asdict(data.task), "method": asdict(job.method)},
        "data_sha256": data.sha256,
        "versions": versions(),
        "hardware": hardware(),
        "commit": commit(),
        "command": command_line(),
    }
    if not job.is_trial:
        record["adapter_bytes"] = _save(job.method, model, tokenizer, folder / WEIGHTS)
    return record


def _fit(trainer: Trainer, job: Job, folder: Path, label: str) -> DivergedError | None:
    """Train to the last step; returns what ended the run before it."""
    checkpoint = last_checkpoint(folder)
    try:
        trainer.train(None if checkpoint is None else str(checkpoint))
    except DivergedError as error:
        _logger.warning(
            "%s diverged: %s of %s, and it stopped there; its score is NaN. Try a learning rate below %g",
            label,
            error,
            trainer.state.max_steps,
            job.learning_rate,
        )
        # Without its traceback, which holds the step's graph.
        return error.with_traceback(None)
    if trainer.state.global_step < trainer.state.max_steps:
        raise KeyboardInterrupt(f"stopped at step {trainer.state.global_step} of {trainer.state.max_steps}")
    return None


def _settings(config: AdaptConfig) -> dict[str, Any]:
    return {name: value for name, value in config.as_dict().items() if name not in ("tasks", "methods", "seeds")}


def _save(method: Method, model: Any, tokenizer: PreTrainedTokenizerBase, folder: Path) -> int:
    """Bytes of the weights that were written."""
    options: dict[str, Any] = {}
    if method.kind == "head":
        options["state_dict"] = {name: p for name, p in model.named_parameters() if p.requires_grad}
    with naming_writes(folder):
        model.save_pretrained(folder, **options)
        tokenizer.save_pretrained(folder)
    weights = folder / SAFETENSORS_WEIGHTS_NAME
    files = [weights] if weights.is_file() else list(folder.glob("*.safetensors"))
    return sum(file.stat().st_size for file in files)


def _trainer(config: AdaptConfig, job: Job, data: TaskData, model: nn.Module, folder: Path, label: str) -> Trainer:
    metric, steps = data.task.scored_by, config.steps_of(data.task)
    evaluates = config.eval_every is not None
    every = config.eval_every or max(1, steps // 2)
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=config.batch_size // config.accumulation,
        gradient_accumulation_steps=config.accumulation,
        per_device_eval_batch_size=2 * config.batch_size,
        learning_rate=job.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=config.warmup_steps,
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        eval_strategy="steps" if evaluates else "no",
        eval_steps=every,
        save_strategy="steps",
        save_steps=every,
        save_total_limit=2,
        load_best_model_at_end=evaluates,
        metric_for_best_model=None if not evaluates else "loss" if metric == "loss" else "score",
        greater_is_better=None if not evaluates else metric != "loss",
        logging_steps=max(1, steps // 20),
        logging_nan_inf_filter=False,
        seed=job.seed,
        data_seed=job.seed,
        use_cpu=not torch.cuda.is_available(),
        bf16=config.precision == "bf16",
        # Batches of examples of like length: less padding.
        train_sampling_strategy="random" if metric == "loss" else "group_by_length",
        report_to="none",
        remove_unused_columns=False,
        dataloader_pin_memory=torch.cuda.is_available(),
    )

    # More GPUs would silently multiply the batch.
    arguments._n_gpu = min(1, arguments.n_gpu)

    def compute(prediction: Any) -> dict[str, float]:
        return {"score": score(metric, np.asarray(prediction.predictions, float), np.asarray(prediction.label_ids))}

    trainer = HeadTrainer(
        config.head_learning_rate,
        model=model,
        args=arguments,
        train_dataset=data.train,
        eval_dataset=data.validation,
        data_collator=data.collate,
        compute_metrics=None if metric == "loss" else compute,
    )
    show_progress(trainer, label)
    trainer.add_callback(Notes(model))
    return trainer


def _evaluate(trainer: Trainer, data: TaskData, part: Any) -> dict[str, float]:
    found = trainer.evaluate(part)
    loss = found["eval_loss"]
    return {"score": -loss if data.task.scored_by == "loss" else found["eval_score"], "loss": loss}


def _loss(trainer: Trainer, part: Any) -> float:
    loss: float = trainer.evaluate(part)["eval_loss"]
    return loss


def _curve(trainer: Trainer) -> list[dict[str, float]]:
    """Training losses, and scores on held-out examples, by step."""
    keys = {"loss": "loss", "eval_score": "score", "eval_loss": "validation_loss"}
    return [
        {"step": entry["step"], **{name: entry[key] for key, name in keys.items() if key in entry}}
        for entry in trainer.state.log_history
        if any(key in entry for key in keys)
    ]
