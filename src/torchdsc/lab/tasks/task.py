"""What an experiment needs to know of the task that its runs train for."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, ClassVar, Generic, TypeVar

from torchdsc.lab.schema import Model

__all__ = ["Column", "Measure", "Record", "Task", "Timed"]

Record = Mapping[str, Any]
"""What a run leaves: see :meth:`Task.run`."""

SettingsT = TypeVar("SettingsT", bound=Model)


@dataclass(frozen=True)
class Measure:
    """The figure that variants are compared by.

    Attributes:
        key: Where it is in a record.
        name: In words, "validation loss".
        unit: "nats per token".
        decimals: In tables.
        lower_is_better: Or higher.
        curve: Where it is in the points of a record's curve.
        size: Where a record has the number of parameters by which variants are of like size.
        test: Where a record has the same on the test part; None where the figure itself is of that part.
    """

    key: str
    name: str
    unit: str
    decimals: int
    lower_is_better: bool
    curve: str
    size: str
    test: str | None = None


@dataclass(frozen=True)
class Column:
    """A further column of the table of results.

    Attributes:
        title: Its head.
        value: The figure of a record; None where it has none.
        form: How it is written, as ``format`` takes it.
        has_spread: Whether the sample deviation over seeds stands beside the mean.
        cost: What it is on the axis of a figure, in which the measure is drawn against it; None for no figure.
    """

    title: str
    value: Callable[[Record], float | None]
    form: str
    has_spread: bool = False
    cost: str | None = None

    def text(self, values: Sequence[float]) -> str:
        """The figures of a variant's runs in words; those that are not finite, of runs that diverged, are left out."""
        finite = [value for value in values if math.isfinite(value)]
        if not finite:
            return "NaN"
        spread = f" ± {stdev(finite):{self.form}}" if self.has_spread and len(finite) > 1 else ""
        return f"{fmean(finite):{self.form}}{spread}"


@dataclass(frozen=True)
class Timed:
    """What is timed in turn with other variants: ``call``, on a batch of this shape."""

    call: Callable[[], object]
    batch: tuple[int, ...]


class Task(ABC, Generic[SettingsT]):
    """What runs train, and how they are measured. A task keeps the data it has loaded.

    Attributes:
        settings_type: Class of a run's settings, which have ``steps``.
        measure: What variants are compared by.
        columns: Of the table of results, beside that.
        timed_words: What :meth:`timed` times: "forward pass".
    """

    settings_type: ClassVar[type[Model]]
    measure: ClassVar[Measure]
    columns: ClassVar[tuple[Column, ...]] = ()
    timed_words: ClassVar[str] = "call"

    @classmethod
    def measure_of(cls, records: Sequence[Record]) -> Measure:
        """What variants with these records are compared by, where that depends on what was measured."""
        return cls.measure

    @abstractmethod
    def describe(self, settings: SettingsT) -> str:
        """A run's model in words, its sizes among them.

        Raises:
            TypeError: If an option has another type.
            ValueError: If there is no such model: a budget is infeasible, or an option does not fit.
        """

    @abstractmethod
    def run(self, settings: SettingsT, seed: int, folder: Path, *, label: str, is_trial: bool) -> dict[str, Any]:
        """Train, or go on where it stopped, or return what a finished run recorded.

        Args:
            settings: Of the run.
            seed: Of all that is random.
            folder: The run's own folder, for checkpoints and weights.
            label: What a progress bar says.
            is_trial: Leave the test part alone, and keep no weights.

        Returns:
            What the run found: the figures of ``measure`` and ``columns``, and where there are any "curve" and
            "train_curve" (points with "step"), "routing" and "diverged_at_step". The record has beside these
            "description", "steps", "config" (the settings), "data" (their hashes), "train_seconds",
            "peak_memory_bytes", "versions", "hardware", "commit" and "command". A run that writes its
            ``record.json`` itself has all of them there.
        """

    def data(self, settings: SettingsT) -> dict[str, str]:
        """Load a run's data; hashes of their contents, by what they are called in errors.

        Raises:
            ValueError: If they cannot be used.
            OSError: If they cannot be read.
        """
        return {}

    def timed(self, settings: SettingsT, folder: Path) -> Timed | None:
        """What is timed, of the variant with these settings and a finished run in this folder; None for nothing."""
        return None

    def seconds(self, settings: SettingsT, *, is_trial: bool) -> float:
        """About how long a run takes here, from a few steps; NaN where that cannot be told."""
        return math.nan
