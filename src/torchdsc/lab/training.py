"""One training run: a method and a seed, from token files to a record."""

import logging
import math
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase, TrainingArguments, set_seed

from torchdsc.baselines.methods import METHODS
from torchdsc.models import DSCGPTConfig, DSCGPTForCausalLM

from .budget import Plan, solve
from .checkpoints import last_checkpoint, remove_checkpoints
from .config import ExperimentConfig
from .corpora import Corpus
from .environment import command_line, commit, hardware, quiet_transformers, reset_peak_memory, versions
from .files import draft_beside, naming_writes, new_folder, read_json, remove_drafts, write_json
from .summaries import REQUIRED_KEYS
from .tokens import FixedWindows, RandomWindows, TokenSplits
from .trainer import DivergedError, LabTrainer, show_progress

__all__ = ["Data", "build_model", "build_trainer", "make_plans", "train_run"]

RECORD = "record.json"
MODEL = "model"

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Data:
    """A prepared corpus, its tokens, and the tokenizer that they are of."""

    corpus: Corpus
    tokens: TokenSplits
    tokenizer: PreTrainedTokenizerBase

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding: the tokens, rounded up to a multiple of 64."""
        return -(-self.tokens.vocab_size // 64) * 64


def make_plans(config: ExperimentConfig, vocab_size: int) -> dict[str, Plan]:
    """Solve the budget for every method of an experiment.

    Args:
        config: The experiment.
        vocab_size: Rows of the embedding.

    Returns:
        Plans by method.

    Raises:
        ValueError: If a target is infeasible.
    """
    budget = config.budget(vocab_size)

    def plan(method: Any, match: Plan | None) -> Plan:
        top_k = config.experts_per_token if METHODS[method].form == "experts" else config.of_method(method, "top_k")
        options = config.of_method(method, "feed_forward")
        return solve(method, budget, top_k=top_k, rank=config.rank, match=match, options=options)

    match = None if config.match is None else plan(config.match, None)
    return {m: match if match is not None and m == config.match else plan(m, match) for m in config.methods}


def build_model(config: ExperimentConfig, plan: Plan, vocab_size: int) -> DSCGPTForCausalLM:
    """The model of a plan, freshly initialised."""
    model_config = DSCGPTConfig(
        vocab_size=vocab_size,
        hidden_size=config.d_model,
        num_hidden_layers=config.n_layer,
        num_attention_heads=config.n_head,
        max_position_embeddings=config.window,
        feed_forward=plan.method,
        intermediate_size=plan.intermediate_size,
        feed_forward_options=plan.options,
        dropout=config.dropout,
        residual_init=config.residual_init,
    )
    return DSCGPTForCausalLM(model_config)


def train_run(
    config: ExperimentConfig,
    plan: Plan,
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
        config: The experiment.
        plan: The method's widths.
        seed: Of weights, dropout and windows.
        data: Corpus and tokens.
        folder: The run's own folder.
        callbacks: Further Trainer callbacks.
        label: What the progress bar says.
        is_trial: Leave the test part alone, and keep no model.

    Returns:
        The run's record; its latency is measured later, with those it is compared to.

    Raises:
        ValueError: If a split is shorter than a window, several processes were launched, or a file of the run is
            damaged.
        OSError: If the folder cannot be written, as on a full disk.
        KeyboardInterrupt: If a callback stopped the training; a later call goes on from the last checkpoint.
    """
    record_file = folder / RECORD
    if record_file.is_file():
        # Latencies are measured later.
        record = read_json(record_file, keys=[key for key in REQUIRED_KEYS if key != "latency_ms"])
        # A kill may have come between the record and their removal.
        remove_checkpoints(folder)
        return record
    with new_folder(folder), quiet_transformers():
        remove_drafts(folder)
        label = label or f"{plan.method} seed {seed}"
        record = _train(config, plan, seed, data, folder, callbacks or [], label, is_trial=is_trial)
    write_json(record_file, record)
    remove_checkpoints(folder)
    return record


def _train(
    config: ExperimentConfig,
    plan: Plan,
    seed: int,
    data: Data,
    folder: Path,
    callbacks: list[Any],
    label: str,
    *,
    is_trial: bool,
) -> dict[str, Any]:
    set_seed(seed)
    reset_peak_memory()
    model = build_model(config, plan, data.vocab_size)
    trainer = build_trainer(config, plan.method, model, seed, data, folder, label)
    for callback in callbacks:
        trainer.add_callback(callback)
    diverged = _fit(config, trainer, folder)
    if diverged is not None:
        _logger.warning("%s", _advice(config, plan.method, label, diverged))
    measured = _measured(config, plan, seed, trainer, diverged)
    test_loss = None
    if not is_trial and diverged is None:
        test = FixedWindows(data.tokens.test, config.window, config.test_windows)
        test_loss = trainer.evaluate(test)["eval_loss"]
        _save(model, data.tokenizer, folder / MODEL)
    elif not is_trial:
        test_loss = math.nan
    return {
        **measured,
        "test_loss": test_loss,
        "description": plan.description,
        "config": {**config.as_dict(), "method": plan.method, "plan": _plan_dict(plan)},
        "corpus": {"name": data.corpus.name, "sha256": data.corpus.sha256},
        "versions": versions(),
        "hardware": hardware(),
        "commit": commit(),
        "command": command_line(),
    }


def _fit(config: ExperimentConfig, trainer: LabTrainer, folder: Path) -> DivergedError | None:
    """Train to the last step and evaluate there; returns what ended the run before, or at, that step."""
    checkpoint = last_checkpoint(folder)
    try:
        trainer.train(None if checkpoint is None else str(checkpoint))
    except DivergedError as error:
        # Without its traceback, which holds the step's graph.
        return error.with_traceback(None)
    if trainer.state.global_step < config.steps:
        raise KeyboardInterrupt(f"stopped at step {trainer.state.global_step} of {config.steps}")
    if not any("eval_loss" in entry and entry["step"] == config.steps for entry in trainer.state.log_history):
        trainer.evaluate()
    final = next(entry["eval_loss"] for entry in reversed(trainer.state.log_history) if "eval_loss" in entry)
    return None if math.isfinite(final) else DivergedError(config.steps, final)


def _advice(config: ExperimentConfig, method: str, label: str, diverged: DivergedError) -> str:
    cures = [f"a learning_rate below {config.of_method(method, 'learning_rate'):g}"]
    if config.warmup_steps < config.steps:
        cures.append(f"more warmup_steps than {config.warmup_steps}")
    if config.precision != "fp32":
        cures.append("precision fp32")
    return (
        f"{label} diverged: {diverged} of {config.steps}, and it stopped there. "
        f"Try {' or '.join(cures)}, in another folder"
    )


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
    with draft_beside(folder, is_folder=True) as draft, naming_writes(folder):
        model.save_pretrained(draft)
        tokenizer.save_pretrained(draft)
        # Drafts can be read by their owner alone.
        draft.chmod(0o755)
        shutil.rmtree(folder, ignore_errors=True)
        draft.rename(folder)


def build_trainer(
    config: ExperimentConfig,
    method: str,
    model: DSCGPTForCausalLM,
    seed: int,
    data: Data,
    folder: Path,
    label: str,
) -> LabTrainer:
    """The trainer of a run, with its schedule, data and progress bar."""
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=config.steps,
        per_device_train_batch_size=config.batch_size // config.accumulation,
        gradient_accumulation_steps=config.accumulation,
        per_device_eval_batch_size=config.eval_batch_size,
        learning_rate=config.of_method(method, "learning_rate"),
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": config.min_lr_ratio},
        warmup_steps=config.warmup_steps,
        weight_decay=config.of_method(method, "weight_decay"),
        adam_beta1=config.beta1,
        adam_beta2=config.beta2,
        max_grad_norm=config.max_grad_norm,
        eval_strategy="steps",
        eval_steps=config.eval_every,
        save_strategy="steps",
        save_steps=config.eval_every,
        save_total_limit=2,
        logging_steps=max(1, config.eval_every // 10),
        # A loss that is not finite is a result, not to be replaced by the mean of those before.
        logging_nan_inf_filter=False,
        seed=seed,
        data_seed=seed,
        # Trainer takes half precision for a GPU's unless it is told.
        use_cpu=not torch.accelerator.is_available(),
        bf16=config.precision == "bf16",
        fp16=config.precision == "fp16",
        torch_compile=config.compile,
        report_to="none",
        remove_unused_columns=False,
        prediction_loss_only=True,
        dataloader_pin_memory=torch.cuda.is_available(),
    )
    if arguments.world_size > 1:
        raise ValueError(f"a run of the lab takes one process, got a launch of {arguments.world_size}")
    # More GPUs would silently multiply the batch.
    arguments._n_gpu = min(1, arguments.n_gpu)
    trainer = LabTrainer(
        router_lr_multiplier=config.of_method(method, "router_lr_multiplier"),
        atom_lr_multiplier=config.of_method(method, "atom_lr_multiplier"),
        model=model,
        args=arguments,
        train_dataset=RandomWindows(data.tokens.train, config.window, config.steps * config.batch_size, seed),
        eval_dataset=FixedWindows(data.tokens.valid, config.window, config.eval_windows),
    )
    show_progress(trainer, label)
    return trainer


def _measured(
    config: ExperimentConfig, plan: Plan, seed: int, trainer: LabTrainer, diverged: DivergedError | None
) -> dict[str, Any]:
    history, layers = trainer.state.log_history, trainer.routing
    per_step = config.batch_size * config.window
    found = {entry["step"]: entry["eval_loss"] for entry in history if "eval_loss" in entry}
    # Curves of a comparison have the same steps: a run that diverged has NaN from there on.
    steps = dict.fromkeys([*range(config.eval_every, config.steps + 1, config.eval_every), config.steps])
    curve = [{"step": s, "tokens": s * per_step, "val_loss": found.get(s, math.nan)} for s in steps]
    train_curve = [
        {"step": entry["step"], "loss": entry["loss"], "task_loss": entry.get("task_loss", entry["loss"])}
        for entry in history
        if "loss" in entry
    ]
    if diverged is not None:
        train_curve.append({"step": diverged.step, "loss": diverged.loss, "task_loss": diverged.loss})
    return {
        "method": plan.method,
        "seed": seed,
        "params_total": plan.params_total,
        "params_active": plan.params_active,
        "tokens": config.steps * per_step,
        "steps": config.steps,
        "val_loss_best": math.nan if diverged else min(found.values()),
        "val_loss_final": math.nan if diverged else found[config.steps],
        "diverged_at_step": diverged.step if diverged else None,
        "train_seconds": trainer.seconds,
        "peak_memory_bytes": trainer.peak_memory_bytes,
        "curve": curve,
        "train_curve": train_curve,
        "routing": {
            "history": [{"step": e["step"], **e["routing"]} for e in history if "routing" in e],
            "layers": layers,
        }
        if layers
        else None,
    }


def _plan_dict(plan: Plan) -> dict[str, Any]:
    return {
        "intermediate_size": plan.intermediate_size,
        "options": plan.options,
        "miss_total": plan.miss_total,
        "miss_active": plan.miss_active,
    }
