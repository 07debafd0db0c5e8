"""One training run: a method and a seed, from a series to a record."""

import math
from pathlib import Path
from typing import Any

import numpy as np
from transformers import set_seed

from torchdsc.lab.budget import Plan, solve_settings
from torchdsc.lab.files import naming_writes, whole_folder
from torchdsc.lab.training.arguments import evaluated_arguments
from torchdsc.lab.training.environment import reset_peak_memory
from torchdsc.lab.training.runs import evaluated_steps, evaluations, fit, measure_pace, recorded, routing_of, summary
from torchdsc.lab.training.trainer import LabTrainer
from torchdsc.optim import build_optimizer

from .data import Data
from .model import PatchForecaster, PatchForecasterConfig
from .settings import Settings

__all__ = ["MODEL", "build_model", "build_trainer", "make_plan", "measure_seconds", "train_run"]

MODEL = "model"
_TIMED_STEPS = 4
_REQUIRED = (
    *("params_total", "params_active", "scales"),
    *("val_mse_best", "val_mse_final", "val_mae_final", "test_mse", "test_mae"),
)


def make_plan(settings: Settings) -> Plan:
    """Solve the budget for the method of a run.

    Raises:
        TypeError: If an option has another type.
        ValueError: If a target is infeasible.
    """
    return solve_settings(settings, settings.budget)


def build_model(settings: Settings, plan: Plan) -> PatchForecaster:
    """The model of a plan, freshly initialised."""
    config = PatchForecasterConfig(
        look_back=settings.look_back,
        horizon=settings.horizon,
        patch_length=settings.patch_length,
        stride=settings.stride,
        hidden_size=settings.d_model,
        num_hidden_layers=settings.n_layer,
        num_attention_heads=settings.n_head,
        attention=settings.attention,
        feed_forward=plan.method,
        intermediate_size=plan.intermediate_size,
        feed_forward_options=plan.options,
        dropout=settings.dropout,
        initializer_range=settings.initializer_range,
        residual_init=settings.residual_init,
    )
    return PatchForecaster(config)


def train_run(
    settings: Settings,
    seed: int,
    data: Data,
    folder: Path,
    *,
    callbacks: list[Any] | None = None,
    label: str | None = None,
    is_trial: bool = False,
) -> dict[str, Any]:
    """Train one method with one seed, or go on where it stopped, or return what a finished run recorded.

    The folder ends with ``record.json`` and, but for trials, the final model; checkpoints are kept only while it
    trains. A run whose loss is not finite stops there, with a warning that says what to do: its record has the step as
    ``diverged_at_step`` (None for any other run) and NaN for errors, and there is no model.

    Args:
        settings: Of the run.
        seed: Of weights, dropout and the order of windows.
        data: The series.
        folder: The run's own folder.
        callbacks: Further Trainer callbacks.
        label: What the progress bar says.
        is_trial: Leave the test part alone, and keep no model.

    Returns:
        The run's record. Errors are of standardised values, averaged over windows, rows and columns.

    Raises:
        ValueError: If several processes were launched, or a file of the run is damaged.
        OSError: If the folder cannot be written, as on a full disk.
        KeyboardInterrupt: If a callback stopped the training; a later call goes on from the last checkpoint.
    """

    def make() -> dict[str, Any]:
        words = label or f"{settings.method} seed {seed}"
        return _train(settings, seed, data, folder, callbacks or [], words, is_trial=is_trial)

    return recorded(folder, make, keys=_REQUIRED)


def measure_seconds(settings: Settings, data: Data, *, is_trial: bool) -> float:
    """About how long a run takes here.

    Args:
        settings: Of the run.
        data: The series.
        is_trial: Whether the test part is left alone.
    """
    windows = settings.eval_batch_size
    of_part = {"batch_size": settings.batch_size // settings.accumulation, "accumulation": 1, "eval_windows": windows}
    short = settings.model_copy(update={"steps": _TIMED_STEPS, "warmup_steps": 0, **of_part})

    def build(folder: Path) -> LabTrainer:
        return build_trainer(short, build_model(short, make_plan(short)), 0, data, folder, f"timing {settings.method}")

    step, evaluation = measure_pace(build)
    evaluated = math.ceil(settings.steps / settings.eval_every) * len(data.windows("valid", settings.eval_windows))
    evaluated += 0 if is_trial else len(data.windows("test", settings.test_windows))
    measured = len(data.windows("valid", windows))
    return settings.steps * settings.accumulation * step + evaluated * evaluation / measured


def _train(
    settings: Settings, seed: int, data: Data, folder: Path, callbacks: list[Any], label: str, *, is_trial: bool
) -> dict[str, Any]:
    plan = make_plan(settings)
    set_seed(seed)
    reset_peak_memory()
    model = build_model(settings, plan)
    trainer = build_trainer(settings, model, seed, data, folder, label)
    for callback in callbacks:
        trainer.add_callback(callback)
    diverged = fit(trainer)
    curve = _curve(settings, trainer.state.log_history)
    last = {"val_mse": math.nan, "val_mae": math.nan} if diverged else curve[-1]
    record = {
        "method": plan.method,
        "seed": seed,
        "params_total": plan.params_total,
        "params_active": plan.params_active,
        "val_mse_best": math.nan if diverged else min(point["val_mse"] for point in curve),
        "val_mse_final": last["val_mse"],
        "val_mae_final": last["val_mae"],
        "curve": curve,
        "routing": routing_of(trainer.state.log_history),
        **summary(trainer, settings, diverged),
        "test_mse": None if is_trial else math.nan,
        "test_mae": None if is_trial else math.nan,
        "description": plan.description,
        "plan": plan.widths,
        "scales": data.scales,
        "data": data.hashes,
    }
    if not is_trial and diverged is None:
        found = trainer.evaluate(data.windows("test", settings.test_windows))
        record |= {"test_mse": found["eval_loss"], "test_mae": found["eval_mae"]}
        _save(model, folder / MODEL)
    return record


def _curve(settings: Settings, history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    steps = evaluated_steps(settings.steps, settings.eval_every)
    return [
        {"step": step, "val_mse": entry["eval_loss"], "val_mae": entry["eval_mae"]}
        for step, entry in evaluations(history, steps)
    ]


def _save(model: PatchForecaster, folder: Path) -> None:
    """The model; its folder is whole or absent, and one from before a kill is replaced."""
    with whole_folder(folder) as draft, naming_writes(folder):
        model.save_pretrained(draft)


def _absolute_error(prediction: Any) -> dict[str, float]:
    difference = np.asarray(prediction.predictions, np.float64) - np.asarray(prediction.label_ids, np.float64)
    return {"mae": float(np.abs(difference).mean())}


def build_trainer(
    settings: Settings, model: PatchForecaster, seed: int, data: Data, folder: Path, label: str
) -> LabTrainer:
    """The trainer of a run, with its schedule, data and progress bar."""
    arguments = evaluated_arguments(settings, folder, seed)
    trainer = LabTrainer(
        label=label,
        model=model,
        args=arguments,
        train_dataset=data.random_windows(settings.steps * settings.batch_size, seed),
        eval_dataset=data.windows("valid", settings.eval_windows),
        compute_metrics=_absolute_error,
    )
    # Now that the model is on its device.
    trainer.optimizer = build_optimizer(
        model,
        learning_rate=settings.learning_rate,
        weight_decay=settings.weight_decay,
        router_lr_multiplier=settings.router_lr_multiplier,
        atom_lr_multiplier=settings.atom_lr_multiplier,
        betas=(settings.beta1, settings.beta2),
    )
    return trainer
