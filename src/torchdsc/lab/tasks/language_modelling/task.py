"""The task of language modelling: loss of language models on held-out text."""

import logging
import math
from pathlib import Path
from typing import Any, ClassVar

import torch

from torchdsc.lab.budget import describe_misses
from torchdsc.lab.tasks.task import Column, Measure, Record, Timed
from torchdsc.lab.tasks.task import Task as Base
from torchdsc.lab.training.environment import quiet_transformers
from torchdsc.lab.training.loading import load_model
from torchdsc.models import DSCGPTForCausalLM

from .data import Data, load_data
from .run import MODEL, make_plan, measure_seconds, train_run
from .settings import Settings

__all__ = ["Task"]

_logger = logging.getLogger(__name__)


def _perplexity(record: Record) -> float:
    return math.exp(min(float(record["val_loss_final"]), 700.0))


def _bits_per_byte(record: Record) -> float | None:
    bytes_per_token = record.get("bytes_per_token")
    return None if bytes_per_token is None else record["val_loss_final"] / math.log(2) / bytes_per_token


def _training_flops(record: Record) -> float:
    # Two for each active parameter and token forwards, four backwards; attention's own products are left out.
    return 6.0 * float(record["params_active"]) * float(record["tokens"])


class Task(Base[Settings]):
    """Language models with different feed-forward layers, by their loss on held-out text."""

    settings_type = Settings
    measure: ClassVar[Measure] = Measure(
        key="val_loss_final",
        name="validation loss",
        unit="nats per token",
        decimals=3,
        lower_is_better=True,
        curve="val_loss",
        size="params_total",
        test="test_loss",
    )
    columns: ClassVar[tuple[Column, ...]] = (
        Column("total", lambda run: run["params_total"], ",.0f"),
        Column("active", lambda run: run["params_active"], ",.0f"),
        Column("training FLOPs", _training_flops, ".2g"),
        Column("perplexity", _perplexity, ".1f"),
        Column("bits per byte", _bits_per_byte, ".3f", has_spread=True),
        Column("test loss", lambda run: run["test_loss"], ".3f", has_spread=True),
    )
    timed_words: ClassVar[str] = "forward pass"

    def __init__(self) -> None:
        self._loaded: dict[tuple[object, ...], Data] = {}

    def describe(self, settings: Settings) -> str:
        """The widths that the budget comes to, and by how much they miss it."""
        vocab_size = self._data(settings).vocab_size
        plan = make_plan(settings, vocab_size)
        return "; ".join([str(plan), *describe_misses(plan, settings.budget(vocab_size), settings.match)])

    def data(self, settings: Settings) -> dict[str, str]:
        """The corpus' hash."""
        return self._data(settings).hashes

    def run(self, settings: Settings, seed: int, folder: Path, *, label: str, is_trial: bool) -> dict[str, Any]:
        """See :func:`~torchdsc.lab.tasks.language_modelling.run.train_run`."""
        return train_run(settings, seed, self._data(settings), folder, label=label, is_trial=is_trial)

    def timed(self, settings: Settings, folder: Path) -> Timed | None:
        """The forward pass of an evaluation batch through a trained model."""
        if not (folder / MODEL).is_dir():
            return None
        device = "cuda" if torch.cuda.is_available() else "cpu"
        with quiet_transformers():
            model: Any = load_model(DSCGPTForCausalLM, folder / MODEL).eval()
        model.to(device)
        windows = self._data(settings).windows("valid", settings.window)
        batch = torch.stack([windows[i % len(windows)]["input_ids"] for i in range(settings.eval_batch_size)])
        inputs = batch.to(device)

        @torch.inference_mode()
        def call() -> object:
            return model(inputs, use_cache=False)

        return Timed(call, tuple(batch.shape))

    def seconds(self, settings: Settings, *, is_trial: bool) -> float:
        """From a few steps and an evaluation."""
        return measure_seconds(settings, self._data(settings), is_trial=is_trial)

    def _data(self, settings: Settings) -> Data:
        if settings.data_key not in self._loaded:
            for doubt in settings.doubts():
                _logger.warning("%s", doubt)
            self._loaded[settings.data_key] = load_data(settings)
        return self._loaded[settings.data_key]
