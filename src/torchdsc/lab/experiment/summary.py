"""Results reduced to a row a variant, compared by the one rule."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from torchdsc.lab.tasks.task import Measure, Record

from .intervals import Interval, mean_difference, median_ratio
from .results import Results
from .words import format_millions, format_span

__all__ = ["Comparison", "Row", "describe_group", "like_sized", "ranked", "summarize", "verdict"]

# Variants whose sizes differ by less than this share are ranked together.
_LIKE_SIZE = 0.10


@dataclass(frozen=True)
class Comparison:
    """A variant compared with another.

    Attributes:
        other: Name of the other.
        difference: Of the measure, own less other's.
        by_seed: Mean over cases of the difference with each seed that both have.
        test: Difference of the measure on the test part; None where it was not looked at.
        verdict: In words.
        share_of_steps: Share of the training steps after which the mean reaches the other's last one, interpolated
            linearly between evaluations; None if it never does, or there are no curves.
        time: Ratio of the times, round by round; None where one was not timed.
        size: Ratio of the sizes by which variants are ranked together; None where the other's is zero.
    """

    other: str
    difference: Interval
    by_seed: dict[int, float]
    test: Interval | None
    verdict: str
    share_of_steps: float | None
    time: Interval | None
    size: float | None


@dataclass(frozen=True)
class Row:
    """One variant over cases and seeds.

    Attributes:
        name: The variant.
        description: Its model in words.
        trial: The settings of its best trial.
        runs: Its records, one or more.
        values: The measure by case and seed.
        size: Parameters by which it is ranked with others.
        time: Its time over that of the experiment's reference, round by round; None where one was not timed.
        memory: Its peak memory, when timed, over that of the reference.
        comparisons: With each variant that it is compared to and that has runs.
    """

    name: str
    description: str
    trial: dict[str, Any]
    runs: list[Record]
    values: dict[str, dict[int, float]]
    size: int
    time: Interval | None
    memory: float | None
    comparisons: list[Comparison]

    @property
    def mean(self) -> float:
        """Mean over cases of the mean over seeds, of runs that did not diverge; NaN where all of a case did."""
        means = []
        for by_seed in self.values.values():
            finite = [value for value in by_seed.values() if math.isfinite(value)]
            means.append(fmean(finite) if finite else math.nan)
        return fmean(means)

    @property
    def is_whole(self) -> bool:
        """Whether no run diverged."""
        return all(math.isfinite(value) for by_seed in self.values.values() for value in by_seed.values())


def summarize(results: Results) -> list[Row]:
    """One row a variant that has runs, in the experiment's order."""
    measure = results.measure
    runs = {variant.name: results.runs_of(variant.name) for variant in results.experiment.variants}
    rows = []
    for variant in results.experiment.variants:
        own = runs[variant.name]
        if not own:
            continue
        others = [other for other in results.experiment.others(variant) if runs[other]]
        time, memory = _cost(results, variant.name, results.experiment.chosen_reference)
        rows.append(
            Row(
                name=variant.name,
                description=own[0]["description"],
                trial=results.chosen[variant.name],
                runs=own,
                values=_values(own, measure.key),
                size=own[0][measure.size],
                time=time,
                memory=memory,
                comparisons=[_compare(results, variant.name, own, other, runs[other]) for other in others],
            )
        )
    return rows


def _values(runs: Iterable[Record], key: str) -> dict[str, dict[int, float]]:
    found: dict[str, dict[int, float]] = {}
    for run in runs:
        if run.get(key) is not None:
            found.setdefault(run["case"], {})[run["seed"]] = run[key]
    return found


def _compare(results: Results, name: str, own: list[Record], other: str, theirs: list[Record]) -> Comparison:
    measure = results.measure
    first, second = (_values(runs, measure.key) for runs in (own, theirs))
    difference = mean_difference(first, second)
    seeds = {seed: set(first) & set(second) for seed in dict.fromkeys(run["seed"] for run in own)}
    by_seed = {
        seed: fmean(first[case][seed] - second[case][seed] for case in cases)
        for seed, cases in seeds.items()
        if cases and all(seed in first[case] and seed in second[case] for case in cases)
    }
    test = None
    if measure.test is not None and all(_values(runs, measure.test) for runs in (own, theirs)):
        test = mean_difference(_values(own, measure.test), _values(theirs, measure.test))
    size = own[0][measure.size] / theirs[0][measure.size] if theirs[0][measure.size] else None
    share = _share_of_steps(own, theirs, measure)
    time, _ = _cost(results, name, other)
    return Comparison(other, difference, by_seed, test, verdict(difference, measure), share, time, size)


def _cost(results: Results, name: str, other: str) -> tuple[Interval | None, float | None]:
    """Time and peak memory of a variant over those of another; None where they were not timed together."""
    own, theirs = results.timing.get(name), results.timing.get(other)
    if name == other or not own or not theirs or len(own["samples"]) != len(theirs["samples"]):
        return None, None
    peaks = own["peak_memory_bytes"], theirs["peak_memory_bytes"]
    return median_ratio(own["samples"], theirs["samples"]), peaks[0] / peaks[1] if all(peaks) else None


def verdict(difference: Interval, measure: Measure) -> str:
    """What a difference says: "lower", "higher", "not decided", "one seed" or "diverged"; better ones say so."""
    if not math.isfinite(difference.mean):
        return "diverged"
    if difference.low is None:
        return "one seed: not decided"
    if not difference.is_decided:
        return "not decided"
    is_lower = difference.mean < 0
    return f"{'lower' if is_lower else 'higher'}: {'better' if is_lower is measure.lower_is_better else 'worse'}"


def _share_of_steps(own: Sequence[Record], others: Sequence[Record], measure: Measure) -> float | None:
    if len({run["case"] for run in (*own, *others)}) > 1:
        return None
    curves = [[point for point in run["curve"] if measure.curve in point] for run in own]
    ends = [[point for point in run["curve"] if measure.curve in point][-1:] for run in others]
    if not all(ends):
        return None
    target, sign = fmean(point[measure.curve] for [point] in ends), 1 if measure.lower_is_better else -1
    before: tuple[float, float] | None = None
    for points in zip(*curves, strict=True):
        step, value = points[0]["step"], fmean(point[measure.curve] for point in points)
        if sign * (value - target) <= 0:
            if before is not None:
                step -= (step - before[0]) * (target - value) / (before[1] - value)
            return float(step / own[0]["steps"])
        before = step, value
    return None


def ranked(rows: Sequence[Row], measure: Measure) -> list[Row]:
    """Rows by their means, the best first."""
    return sorted(rows, key=lambda row: row.mean if measure.lower_is_better else -row.mean)


def like_sized(rows: Sequence[Row]) -> list[list[Row]]:
    """Rows of like size that were trained for the same steps, by size."""
    groups: list[list[Row]] = []
    for row in sorted(rows, key=lambda row: row.size):
        steps = {run["steps"] for run in row.runs}
        for group in groups:
            if row.size <= group[0].size * (1 + _LIKE_SIZE) and steps == {run["steps"] for run in group[0].runs}:
                group.append(row)
                break
        else:
            groups.append([row])
    return groups


def describe_group(rows: Sequence[Row]) -> str:
    """ "1.07 M to 1.08 M parameters, 900 steps", of rows of like size; without steps where cases differ in them."""
    steps = {run["steps"] for row in rows for run in row.runs}
    size = format_span([format_millions(size) for size in sorted(row.size for row in rows)])
    return f"{size} parameters" + (f", {max(steps):,} steps" if len(steps) == 1 else "")
