"""A quantity over training: gathered over seeds, and drawn with its spread."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, MaxNLocator

from torchdsc.lab.summaries import Run

from .style import COLORS, MARKERS, pad_limits

Points = Iterable[tuple[int, float | None]]


@dataclass(frozen=True)
class Series:
    """One quantity of one method over training, for every seed.

    Attributes:
        steps: Steps at which any seed has a point, ascending, of shape (S,).
        values: Of shape (seeds, S); NaN where a seed has no finite value.
    """

    steps: npt.NDArray[np.float64]
    values: npt.NDArray[np.float64]

    @classmethod
    def collect(cls, runs: Sequence[Run], points: Callable[[Run], Points]) -> Series:
        """Gathers `points(run)`, pairs of step and value, of each run."""
        by_seed = [dict(points(run)) for run in runs]
        steps = sorted(set().union(*by_seed))
        values = np.array([[number(seed.get(step)) for step in steps] for seed in by_seed], dtype=np.float64)
        return cls(np.array(steps, dtype=np.float64), values.reshape(len(by_seed), len(steps)))

    @property
    def mean(self) -> npt.NDArray[np.float64]:
        """Mean over seeds; NaN where any seed has no value, since a mean over fewer would jump."""
        mean: npt.NDArray[np.float64] = self.values.mean(axis=0)
        return mean

    @property
    def end(self) -> float:
        """The last mean, or where no step has all seeds, the last value there is; NaN for none."""
        for candidates in (self.mean, np.fmin.reduce(self.values, axis=0)):
            finite = candidates[np.isfinite(candidates)]
            if finite.size:
                return float(finite[-1])
        return math.nan

    @property
    def complete(self) -> bool:
        """Whether every seed ends with a finite value."""
        return bool(self.values.size and np.isfinite(self.values[:, -1]).all())

    def since(self, step: float) -> Series:
        """Returns the part from a step on."""
        keep = self.steps >= step
        return Series(self.steps[keep], self.values[:, keep])


def draw_series(axes: Axes, series: Series, method: str) -> None:
    """Draws the mean over seeds, a band from the lowest seed to the highest, and each seed as a thin line."""
    color = COLORS[method]
    if len(series.values) > 1:
        low, high = np.fmin.reduce(series.values, axis=0), np.fmax.reduce(series.values, axis=0)
        axes.fill_between(series.steps, low, high, color=color, alpha=0.16, linewidth=0)
        for values in series.values:
            marker = "." if series.steps.size == 1 else ""
            axes.plot(series.steps, values, color=color, linewidth=0.8, alpha=0.45, marker=marker)
    axes.plot(series.steps, series.mean, color=color, linewidth=2)
    finite = np.flatnonzero(np.isfinite(series.mean))
    if finite.size:
        last = finite[-1]
        axes.plot([series.steps[last]], [series.mean[last]], color=color, marker=MARKERS[method], markersize=5)


def format_steps(axes: Axes, series: Sequence[Series]) -> None:
    """Fits the x axis to the steps of all series, with whole numbers as ticks."""
    steps = np.concatenate([values.steps for values in series])
    axes.set_xlim(*pad_limits([float(step) for step in steps], 0.02))
    axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))


def number(value: float | None) -> float:
    """Returns the value as a float, NaN for None and infinities."""
    return float(value) if value is not None and math.isfinite(value) else math.nan
