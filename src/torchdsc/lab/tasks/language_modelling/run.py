"""One training run: a method and a seed, from token files to a record."""

import math
from pathlib import Path
from typing import Any

import torch
from torch.optim import Optimizer
from transformers import PreTrainedTokenizerBase, set_seed

from torchdsc.lab.budget import Plan, solve_settings
from torchdsc.lab.data.tokens import RandomWindows, ShuffledWindows
from torchdsc.lab.files import naming_writes, whole_folder
from torchdsc.lab.training.arguments import evaluated_arguments
from torchdsc.lab.training.environment import reset_peak_memory
from torchdsc.lab.training.generation import continue_text
from torchdsc.lab.training.runs import evaluated_steps, evaluations, fit, measure_pace, recorded, routing_of, summary
from torchdsc.lab.training.trainer import LabTrainer
from torchdsc.models import DSCGPTConfig, DSCGPTForCausalLM
from torchdsc.optim import build_optimizer

from .data import Data
from .settings import Settings

__all__ = ["MODEL", "build_model", "build_trainer", "make_plan", "measure_seconds", "optimizer_of", "train_run"]

MODEL = "model"
# Of the sample of text: tokens of the prompt, from the validation part, and tokens added to it.
_PROMPT, _SAMPLE = 16, 48
_TIMED_STEPS = 4
_REQUIRED = ("params_total", "params_active", "tokens", "val_loss_best", "val_loss_final", "test_loss")


def make_plan(settings: Settings, vocab_size: int) -> Plan:
    """Solve the budget for the method of a run.

    Args:
        settings: Of the run.
        vocab_size: Rows of the embedding.

    Raises:
        ValueError: If a target is infeasible.
    """
    return solve_settings(settings, settings.budget(vocab_size))


def build_model(settings: Settings, plan: Plan, vocab_size: int) -> DSCGPTForCausalLM:
    """The model of a plan, freshly initialised."""
    model_config = DSCGPTConfig(
        vocab_size=vocab_size,
        hidden_size=settings.d_model,
        num_hidden_layers=settings.n_layer,
        num_attention_heads=settings.n_head,
        max_position_embeddings=settings.window,
        feed_forward=plan.method,
        intermediate_size=plan.intermediate_size,
        feed_forward_options=plan.options,
        dropout=settings.dropout,
        initializer_range=settings.initializer_range,
        residual_init=settings.residual_init,
    )
    return DSCGPTForCausalLM(model_config)


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

    The folder ends with ``record.json`` and the final model with its tokenizer; checkpoints are kept only while it
    trains. A run whose loss is not finite stops there, with a warning that says what to do: its record has the step as
    ``diverged_at_step`` (None for any other run) and NaN for losses, and there is no model.

    Args:
        settings: Of the run.
        seed: Of weights, dropout and windows.
        data: Corpus and tokens.
        folder: The run's own folder.
        callbacks: Further Trainer callbacks.
        label: What the progress bar says.
        is_trial: Leave the test part alone, and keep no model.

    Returns:
        The run's record.

    Raises:
        ValueError: If a split is shorter than a window, several processes were launched, or a file of the run is
            damaged.
        OSError: If the folder cannot be written, as on a full disk.
        KeyboardInterrupt: If a callback stopped the training; a later call goes on from the last checkpoint.
    """

    def make() -> dict[str, Any]:
        words = label or f"{settings.method} seed {seed}"
        return _train(settings, seed, data, folder, callbacks or [], words, is_trial=is_trial)

    return recorded(folder, make, keys=_REQUIRED)


def measure_seconds(settings: Settings, data: Data, *, is_trial: bool) -> float:
    """About how long a run takes here; what torch.compile takes at the start of a run is left out.

    Args:
        settings: Of the run.
        data: Corpus and tokens.
        is_trial: Whether the test part is left alone.
    """
    windows = min(settings.eval_windows, settings.eval_batch_size)
    of_part = {"batch_size": settings.batch_size // settings.accumulation, "accumulation": 1, "eval_windows": windows}
    short = settings.model_copy(update={"steps": _TIMED_STEPS, "warmup_steps": 0, **of_part})

    def build(folder: Path) -> LabTrainer:
        model = build_model(short, make_plan(short, data.vocab_size), data.vocab_size)
        return build_trainer(short, model, 0, data, folder, f"timing {settings.method}")

    step, evaluation = measure_pace(build)
    evaluated = math.ceil(settings.steps / settings.eval_every) * settings.eval_windows
    evaluated += 0 if is_trial else settings.test_windows
    return settings.steps * settings.accumulation * step + evaluated * evaluation / windows


def _train(
    settings: Settings, seed: int, data: Data, folder: Path, callbacks: list[Any], label: str, *, is_trial: bool
) -> dict[str, Any]:
    plan = make_plan(settings, data.vocab_size)
    set_seed(seed)
    reset_peak_memory()
    model = build_model(settings, plan, data.vocab_size)
    trainer = build_trainer(settings, model, seed, data, folder, label)
    for callback in callbacks:
        trainer.add_callback(callback)
    diverged = fit(trainer)
    curve = _curve(settings, trainer.state.log_history)
    record = {
        "method": plan.method,
        "seed": seed,
        "params_total": plan.params_total,
        "params_active": plan.params_active,
        "tokens": curve[-1]["tokens"],
        "val_loss_best": math.nan if diverged else min(point["val_loss"] for point in curve),
        "val_loss_final": math.nan if diverged else curve[-1]["val_loss"],
        "curve": curve,
        "routing": routing_of(trainer.state.log_history),
        **summary(trainer, settings, diverged),
        "test_loss": None if is_trial else math.nan,
        "bytes_per_token": data.bytes_per_token,
        "sample": None,
        "description": plan.description,
        "plan": plan.widths,
        "data": data.hashes,
    }
    if not is_trial and diverged is None:
        test = data.windows("test", settings.window, settings.test_windows)
        record["test_loss"] = trainer.evaluate(test)["eval_loss"]
        record["sample"] = _sample(model, data, settings)
        _save(model, data.tokenizer, folder / MODEL)
    return record


def _curve(settings: Settings, history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    per_step = settings.batch_size * settings.window
    steps = evaluated_steps(settings.steps, settings.eval_every)
    return [
        {"step": step, "tokens": step * per_step, "val_loss": entry["eval_loss"]}
        for step, entry in evaluations(history, steps)
    ]


def _sample(model: DSCGPTForCausalLM, data: Data, settings: Settings) -> dict[str, str] | None:
    """What the model writes after the beginning of the validation part; None where a window has no room for it."""
    if settings.window < _PROMPT + _SAMPLE:
        return None
    prompt = torch.from_numpy(data.tokens.valid[:_PROMPT].astype("int64"))[None]
    begun, added = continue_text(model, data.tokenizer, prompt.to(model.device), max_new_tokens=_SAMPLE)
    return {"prompt": begun, "text": added}


def _save(model: DSCGPTForCausalLM, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Model and tokenizer, so that transformers' pipelines take the folder.

    The folder is whole or absent; one from before a kill is replaced.
    """
    # Without a length of its own a pipeline would go on past the model's positions.
    model.generation_config.update(
        max_length=model.config.max_position_embeddings,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id,
    )
    with whole_folder(folder) as draft, naming_writes(folder):
        model.save_pretrained(draft)
        tokenizer.save_pretrained(draft)


def build_trainer(
    settings: Settings, model: DSCGPTForCausalLM, seed: int, data: Data, folder: Path, label: str
) -> LabTrainer:
    """The trainer of a run, with its schedule, data and progress bar."""
    arguments = evaluated_arguments(settings, folder, seed, torch_compile=settings.compile, prediction_loss_only=True)
    windows = RandomWindows if settings.order == "random" else ShuffledWindows
    trainer = LabTrainer(
        label=label,
        model=model,
        args=arguments,
        train_dataset=windows(data.tokens.train, settings.window, settings.steps * settings.batch_size, seed),
        eval_dataset=data.windows("valid", settings.window, settings.eval_windows),
    )
    # Now that the model is on its device.
    trainer.optimizer = optimizer_of(settings, model)
    return trainer


def optimizer_of(settings: Settings, model: DSCGPTForCausalLM) -> Optimizer:
    """The optimizer of a run, at the peak of its schedule."""
    return build_optimizer(
        model,
        learning_rate=settings.learning_rate,
        weight_decay=settings.weight_decay,
        router_lr_multiplier=settings.router_lr_multiplier,
        atom_lr_multiplier=settings.atom_lr_multiplier,
        betas=(settings.beta1, settings.beta2),
        optimizer=settings.optimizer,
        muon_learning_rate=settings.muon_learning_rate,
    )
