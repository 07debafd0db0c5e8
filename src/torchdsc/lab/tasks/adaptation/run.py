"""One adaptation: a base model, a method, data and a seed, to a record."""

import math
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from torch import nn
from transformers import PreTrainedTokenizerBase, set_seed

from torchdsc.lab.files import naming_writes
from torchdsc.lab.training.arguments import training_arguments
from torchdsc.lab.training.environment import reset_peak_memory
from torchdsc.lab.training.runs import evaluations, fit, recorded, routing_of, summary
from torchdsc.lab.training.trainer import LabTrainer

from .base import load_base
from .examples import Data, Encoded
from .methods import adapter_parameters, build_model, scale_update, solve_options
from .metrics import score
from .retained import Known, retained
from .settings import Settings
from .trainer import AdaptationTrainer

__all__ = ["adapt_run", "build_trainer", "describe"]

WEIGHTS = "adapter"
_REQUIRED = (
    *("options", "learning_rate", "metric", "score", "loss"),
    *("params_adapter", "params_trainable", "regularization"),
)


def describe(settings: Settings, options: dict[str, Any]) -> str:
    """The method and its solved options in words: "lora: r 8"."""
    words = ", ".join(f"{name} {value}" for name, value in options.items() if name != "target_modules")
    return f"{settings.method}: {words}" if words else settings.method


def adapt_run(
    settings: Settings,
    seed: int,
    data: Data,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    *,
    label: str,
    is_trial: bool,
    options: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Adapt, or go on where it stopped, or return what a finished run recorded.

    The folder ends with ``record.json``, and but for trials with the adapter (or model) and its tokenizer. A run whose
    loss is not finite stops there, with a warning: its record has the step as ``diverged_at_step`` (None for any other
    run) and NaN for scores and losses.

    Args:
        settings: Of the run.
        seed: Of the head, the adapter, the order of examples and dropout.
        data: Of the run.
        tokenizer: Of the base model.
        folder: The run's own folder.
        label: What the progress bar says.
        is_trial: Score on held-out examples of train, and keep no weights.
        options: Of the method, with its size; by default they are solved for the budget.

    Returns:
        The record.

    Raises:
        ValueError: If the record is damaged, or the options do not fit the base model.
        OSError: If the folder cannot be written, as on a full disk.
        KeyboardInterrupt: If the training was stopped; a later call goes on from the last checkpoint.
    """

    def make() -> dict[str, Any]:
        solved = solve_options(settings) if options is None else options
        return _adapt(settings, solved, seed, data, tokenizer, folder, label, is_trial=is_trial)

    return recorded(folder, make, keys=_REQUIRED if is_trial else (*_REQUIRED, "adapter_bytes"))


def _adapt(
    settings: Settings,
    options: dict[str, Any],
    seed: int,
    data: Data,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    label: str,
    *,
    is_trial: bool,
) -> dict[str, Any]:
    set_seed(seed)
    reset_peak_memory()
    model = build_model(settings, options, data.labels, tokenizer.pad_token_id)
    trainer = build_trainer(settings, model, seed, data, folder, label)
    retain = None if is_trial else data.retain
    metrics: dict[str, Any] = {"score": math.nan, "loss": math.nan}
    before = {}
    if retain:
        before = retain.before(trainer, settings.base_key, partial(load_base, settings, 1, weights=True))
    diverged = fit(trainer)
    trained = summary(trainer, settings, diverged)
    # Evaluations that follow are no part of the curves.
    history = list(trainer.state.log_history)
    if settings.update_scale != 1:
        scale_update(model, settings, settings.update_scale)
    if diverged is None:
        metrics |= _measure(settings, trainer, data.validation if is_trial else data.evaluation)
    routing = routing_of(trainer.state.log_history)
    if retain:
        metrics |= retained(before, _nothing(before) if diverged else retain.after(trainer))
    record = {
        "method": settings.method,
        "description": describe(settings, options),
        "options": options,
        "learning_rate": settings.learning_rate,
        "seed": seed,
        "metric": settings.scored_by,
        **metrics,
        "params_adapter": adapter_parameters(model),
        "params_trainable": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "curve": _curve(settings, history),
        "regularization": history[-1].get("regularization", {}) if history else {},
        "routing": routing,
        **trained,
        "data": data.hashes,
    }
    if not is_trial:
        record["adapter_bytes"] = _save(settings, model, tokenizer, folder / WEIGHTS)
        record["scaled"] = [] if diverged is not None else _scaled(settings, trainer, data, before)
    return record


def _measure(settings: Settings, trainer: LabTrainer, examples: Encoded) -> dict[str, float]:
    found = trainer.evaluate(examples)
    return {"score": _score(settings, found), "loss": found["eval_loss"]}


def _scaled(settings: Settings, trainer: LabTrainer, data: Data, before: Known) -> list[dict[str, Any]]:
    """What the run reaches with less and less of its update; of old domains the losses alone."""
    points, scale = [], settings.update_scale
    for factor in sorted(settings.also_scaled, reverse=True):
        scale_update(trainer.model, settings, factor / scale)
        scale = factor
        point: dict[str, Any] = {"scale": factor, **_measure(settings, trainer, data.evaluation)}
        if data.retain:
            point |= retained(before, data.retain.after(trainer, losses_alone=True))
        points.append(point)
    return points


def _nothing(known: Known) -> Known:
    """NaN in place of all that was known."""
    return {source: dict.fromkeys(values, math.nan) for source, values in known.items()}


def _score(settings: Settings, found: Mapping[str, Any]) -> float:
    """Of an evaluation."""
    return float(-found["eval_loss"] if settings.scored_by == "loss" else found["eval_score"])


def _curve(settings: Settings, history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Evaluations on held-out examples while it trained."""
    if settings.eval_every is None:
        return []
    return [
        {"step": step, "score": _score(settings, entry), "validation_loss": entry["eval_loss"]}
        for step, entry in evaluations(history, range(settings.eval_every, settings.steps + 1, settings.eval_every))
    ]


def _save(settings: Settings, model: Any, tokenizer: PreTrainedTokenizerBase, folder: Path) -> int:
    """Bytes of the weights that were written."""
    options: dict[str, Any] = {}
    if settings.method == "head":
        options["state_dict"] = {name: p for name, p in model.named_parameters() if p.requires_grad}
    with naming_writes(folder):
        model.save_pretrained(folder, **options)
        tokenizer.save_pretrained(folder)
    weights = folder / SAFETENSORS_WEIGHTS_NAME
    files = [weights] if weights.is_file() else list(folder.glob("*.safetensors"))
    return sum(file.stat().st_size for file in files)


def build_trainer(settings: Settings, model: nn.Module, seed: int, data: Data, folder: Path, label: str) -> LabTrainer:
    """The trainer of a run, with its schedule, data and progress bar."""
    metric, evaluates = settings.scored_by, settings.eval_every is not None
    arguments = training_arguments(
        settings,
        folder,
        seed,
        every=settings.eval_every or max(1, settings.steps // 2),
        eval_strategy="steps" if evaluates else "no",
        logging_steps=max(1, settings.steps // 20),
        per_device_eval_batch_size=2 * settings.batch_size,
        lr_scheduler_type="cosine",
        load_best_model_at_end=evaluates,
        metric_for_best_model=None if not evaluates else "loss" if metric == "loss" else "score",
        greater_is_better=None if not evaluates else metric != "loss",
        # Batches of examples of like length: less padding.
        train_sampling_strategy="random" if metric == "loss" else "group_by_length",
    )

    def compute(prediction: Any) -> dict[str, float]:
        logits, labels = np.asarray(prediction.predictions, float), np.asarray(prediction.label_ids)
        return {"score": score(metric, logits, labels if data.answers is None else data.answers.classes(labels))}

    return AdaptationTrainer(
        head_learning_rate=settings.head_learning_rate,
        quiet=settings.quiet,
        old_texts=[*data.retain.rest.values()] if data.retain else (),
        label=label,
        model=model,
        args=arguments,
        train_dataset=data.train,
        eval_dataset=data.validation,
        data_collator=data.collate,
        compute_metrics=None if metric == "loss" else compute,
        preprocess_logits_for_metrics=None if data.answers is None else data.answers.logits,
    )
