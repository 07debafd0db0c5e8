"""A training step that can be timed, and about how long a run takes."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.optim import AdamW
from transformers import PreTrainedTokenizerBase

from torchdsc.lab.tasks.task import Timed
from torchdsc.lab.training.environment import quiet_transformers
from torchdsc.lab.training.runs import measure_pace
from torchdsc.lab.training.trainer import LabTrainer

from .examples import Data
from .methods import build_model
from .run import build_trainer
from .settings import Settings

__all__ = ["measure_seconds", "training_step"]

_TIMED_STEPS = 4


def training_step(settings: Settings, options: dict[str, Any], data: Data, tokenizer: PreTrainedTokenizerBase) -> Timed:
    """A training step of a fresh model, of solved options, on one batch."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with quiet_transformers():
        model = build_model(settings, options, data.labels, tokenizer.pad_token_id).to(device).train()
    examples = data.collate([data.train[index % len(data.train)] for index in range(settings.batch_size)])
    batch = {name: value.to(device) for name, value in examples.items()}
    optimizer = AdamW([parameter for parameter in model.parameters() if parameter.requires_grad], lr=1e-5)

    def call() -> None:
        with torch.autocast(device, dtype=torch.bfloat16, enabled=settings.precision == "bf16"):
            loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return Timed(call, tuple(batch["input_ids"].shape))


def measure_seconds(
    settings: Settings, options: dict[str, Any], data: Data, tokenizer: PreTrainedTokenizerBase, *, is_trial: bool
) -> float:
    """About how long a run takes here.

    Args:
        settings: Of the run.
        options: Of the method, with its size.
        data: Of the run.
        tokenizer: Of the base model.
        is_trial: Whether the final score is on the validation part.
    """
    few = replace(data, validation=data.validation[: 2 * settings.batch_size])
    short = settings.model_copy(update={"steps": _TIMED_STEPS, "warmup_steps": 0, "eval_every": None})

    def build(folder: Path) -> LabTrainer:
        model = build_model(settings, options, data.labels, tokenizer.pad_token_id)
        return build_trainer(short, model, 0, few, folder, f"timing {settings.method}")

    step, evaluation = measure_pace(build)
    parts = [data.validation] * (settings.steps // (settings.eval_every or settings.steps + 1))
    parts += [data.validation] if is_trial else [data.evaluation]
    count = sum(map(len, parts)) + (data.retain.num_evaluated if data.retain and not is_trial else 0)
    return settings.steps * step + count * evaluation / len(few.validation)
