"""The task of adaptation: scores of adapted models."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from transformers import PreTrainedTokenizerBase

from torchdsc.lab.tasks.task import Column, Measure, Record, Timed
from torchdsc.lab.tasks.task import Task as Base
from torchdsc.lab.training.environment import quiet_transformers

from .base import load_tokenizer
from .examples import Data, load_data
from .methods import solve_options
from .run import adapt_run, describe
from .settings import Settings
from .timing import measure_seconds, training_step

__all__ = ["Task"]


def _forgotten(run: Record) -> float | None:
    """What the loss on old domains rose by; older records have its ends alone."""
    return run["retain_loss_after"] - run["retain_loss_before"] if "retain_loss_after" in run else None


_LOSS = Measure(
    key="loss",
    name="loss",
    unit="nats per token",
    decimals=3,
    lower_is_better=True,
    curve="validation_loss",
    size="params_adapter",
)


class Task(Base[Settings]):
    """Pretrained models, adapted by different methods, by their score."""

    settings_type = Settings
    measure: ClassVar[Measure] = Measure(
        key="score",
        name="score",
        unit="points",
        decimals=2,
        lower_is_better=False,
        curve="score",
        size="params_adapter",
    )
    columns: ClassVar[tuple[Column, ...]] = (
        Column("adapter parameters", lambda run: run["params_adapter"], ",.0f"),
        Column("saved bytes", lambda run: run.get("adapter_bytes"), ",.0f"),
        Column("learning rate", lambda run: run["learning_rate"], "g"),
        Column("loss on old domains", lambda run: run.get("retain_loss_after"), ".3f", has_spread=True),
        Column("forgotten", _forgotten, ".3f", has_spread=True, cost="forgotten (nats per token)"),
        Column("right choices (%)", lambda run: run.get("choice_after"), ".1f", has_spread=True),
    )
    timed_words: ClassVar[str] = "training step"

    @classmethod
    def measure_of(cls, records: Sequence[Record]) -> Measure:
        """The loss itself where the score is its negative, that of causal LMs."""
        return _LOSS if records and all(record["metric"] == "loss" for record in records) else cls.measure

    def __init__(self) -> None:
        self._loaded: dict[str, tuple[Data, PreTrainedTokenizerBase]] = {}
        self._solved: dict[str, dict[str, Any]] = {}

    def describe(self, settings: Settings) -> str:
        """The method and its options, its size among them."""
        return describe(settings, self._options(settings))

    def data(self, settings: Settings) -> dict[str, str]:
        """Hashes of the sources, by what the settings call them."""
        return self._data(settings)[0].hashes

    def run(self, settings: Settings, seed: int, folder: Path, *, label: str, is_trial: bool) -> dict[str, Any]:
        """See :func:`~torchdsc.lab.tasks.adaptation.run.adapt_run`."""
        options = self._options(settings)
        return adapt_run(settings, seed, *self._data(settings), folder, label=label, is_trial=is_trial, options=options)

    def timed(self, settings: Settings, folder: Path) -> Timed | None:
        """A training step of a fresh model."""
        return training_step(settings, self._options(settings), *self._data(settings))

    def seconds(self, settings: Settings, *, is_trial: bool) -> float:
        """From a step and an evaluated batch."""
        return measure_seconds(settings, self._options(settings), *self._data(settings), is_trial=is_trial)

    def _data(self, settings: Settings) -> tuple[Data, PreTrainedTokenizerBase]:
        key = settings.data_key
        if key not in self._loaded:
            tokenizer = load_tokenizer(settings)
            self._loaded[key] = load_data(settings, tokenizer), tokenizer
        return self._loaded[key]

    def _options(self, settings: Settings) -> dict[str, Any]:
        key = settings.model_key
        if key not in self._solved:
            with quiet_transformers():
                self._solved[key] = solve_options(settings)
        return self._solved[key]
