"""Run records of a comparison, checked and reduced to one summary per method."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torchdsc.baselines.methods import METHODS

Run = Mapping[str, Any]
"""One run record, as read from `results.json`."""

LossName = Literal["val_best", "val_final", "test"]

METHOD_LABELS: dict[str, str] = {name: method.label for name, method in METHODS.items()}
"""What each method is called, in the order of every table and figure."""

REQUIRED_KEYS = (
    *("method", "seed", "params_total", "params_active", "tokens", "steps"),
    *("val_loss_best", "val_loss_final", "test_loss", "latency_ms", "peak_memory_bytes", "train_seconds"),
    *("curve", "routing", "description", "config", "corpus", "versions", "hardware", "commit", "command"),
)
"""Keys that every record has; `train_curve` and `diverged_at_step`, which former records lack, are not needed here."""


@dataclass(frozen=True)
class Statistic:
    """A quantity over the seeds of one method.

    Attributes:
        mean: Mean of the finite values; NaN where there is none.
        std: Sample standard deviation (divisor n - 1) of the finite values; None with fewer than two.
        count: How many values were finite.
    """

    mean: float
    std: float | None
    count: int

    @classmethod
    def over(cls, values: Iterable[float | None]) -> Statistic:
        """Summarises values; None and values that are not finite are left out and not counted."""
        finite = [float(value) for value in values if value is not None and _is_finite(value)]
        mean = statistics.fmean(finite) if finite else math.nan
        return cls(mean, statistics.stdev(finite) if len(finite) > 1 else None, len(finite))

    def overlaps(self, other: Statistic) -> bool:
        """Whether the intervals mean ± std of the two overlap; also True if either has no std."""
        if self.std is None or other.std is None:
            return True
        return abs(self.mean - other.mean) <= self.std + other.std


@dataclass(frozen=True)
class MethodSummary:
    """One method over its seeds: a row of the table.

    Attributes:
        method: Name of the method in the records.
        label: Name of the method for people.
        description: The layer's sizes in words.
        seeds: Seeds run, ascending.
        diverged: Those whose final loss is not finite, with the step at which they stopped where it is known.
        params_total: Parameters stored.
        params_active: Parameters that one token uses.
        val_best: Lowest validation loss of each run.
        val_final: Validation loss at the end of each run.
        test: Test loss.
        latency_ms: Milliseconds for the forward pass of one batch: median over runs of the runs' medians.
        latency_q1: Median over runs of the runs' first quartiles.
        latency_q3: Median over runs of the runs' third quartiles.
        latency_ratio: `latency_ms` over that of Dense; None where Dense is absent or was not timed.
        tokens_per_second: Tokens trained on over the seconds that took, all seeds together that did not diverge.
        peak_memory_bytes: Largest over the seeds; None where it was not measured.
    """

    method: str
    label: str
    description: str
    seeds: tuple[int, ...]
    diverged: dict[int, int | None]
    params_total: int
    params_active: int
    val_best: Statistic
    val_final: Statistic
    test: Statistic
    latency_ms: float
    latency_q1: float
    latency_q3: float
    latency_ratio: float | None
    tokens_per_second: float
    peak_memory_bytes: int | None

    @property
    def num_seeds(self) -> int:
        """How many runs the row stands for."""
        return len(self.seeds)

    def loss(self, name: LossName) -> Statistic:
        """Returns one of the three losses by name."""
        return {"val_best": self.val_best, "val_final": self.val_final, "test": self.test}[name]


def check_runs(runs: Iterable[Run]) -> list[Run]:
    """Checks run records and puts them in order: by method as in `METHOD_LABELS`, then by seed.

    Raises:
        ValueError: If there are no runs, a record lacks a key or names an unknown method, two records have the same
            method and seed, or records of one method differ in parameters.
    """
    checked: dict[tuple[str, int], Run] = {}
    sizes: dict[str, tuple[int, int]] = {}
    for index, run in enumerate(runs):
        missing = [key for key in REQUIRED_KEYS if key not in run]
        missing = missing or [
            f"latency_ms.{key}" for key in ("median", "q1", "q3") if key not in (run["latency_ms"] or {})
        ]
        if missing:
            raise ValueError(f"runs[{index}] lacks {', '.join(missing)}")
        method, seed = run["method"], run["seed"]
        if method not in METHOD_LABELS:
            raise ValueError(f"runs[{index}].method must be one of {', '.join(METHOD_LABELS)}, got {method!r}")
        if (method, seed) in checked:
            raise ValueError(f"runs[{index}] repeats method {method!r} with seed {seed}: one record each")
        size = (run["params_total"], run["params_active"])
        if sizes.setdefault(method, size) != size:
            raise ValueError(
                f"runs[{index}] ({method!r}, seed {seed}) has (params_total, params_active) = {size}, "
                f"other seeds of this method have {sizes[method]}: a mean over different models means nothing"
            )
        checked[method, seed] = run
    if not checked:
        raise ValueError("runs must hold at least one run record, got none")
    order = list(METHOD_LABELS)
    return sorted(checked.values(), key=lambda run: (order.index(run["method"]), run["seed"]))


def group_runs(runs: Iterable[Run]) -> dict[str, list[Run]]:
    """Checks run records and groups them by method, both methods and seeds in order."""
    groups: dict[str, list[Run]] = {}
    for run in check_runs(runs):
        groups.setdefault(run["method"], []).append(run)
    return groups


def summarize(runs: Iterable[Run]) -> list[MethodSummary]:
    """Reduces run records to one summary per method, in the order Dense, MoE, Mixture-of-LoRAs, DSC.

    Losses that are None or not finite are left out of mean and deviation, and `Statistic.count` tells how many stayed.

    Args:
        runs: Records of `results.json`, in any order; seeds and methods may be missing.

    Raises:
        ValueError: As `check_runs`.
    """
    groups = group_runs(runs)
    medians = {method: _latency(group, "median") for method, group in groups.items()}
    dense = medians.get("dense", math.nan)
    return [_summarize_method(method, group, medians[method] / (dense or math.nan)) for method, group in groups.items()]


def _summarize_method(method: str, runs: list[Run], ratio: float) -> MethodSummary:
    diverged = {run["seed"]: run.get("diverged_at_step") for run in runs if not _is_finite(run["val_loss_final"])}
    # Those that stopped before their last step have not trained on all of their tokens.
    whole = [run for run in runs if run.get("diverged_at_step") is None]
    seconds = sum(run["train_seconds"] for run in whole)
    peaks = [run["peak_memory_bytes"] for run in runs if run["peak_memory_bytes"] is not None]
    return MethodSummary(
        method=method,
        label=METHOD_LABELS[method],
        description=runs[0]["description"],
        seeds=tuple(run["seed"] for run in runs),
        diverged=diverged,
        params_total=runs[0]["params_total"],
        params_active=runs[0]["params_active"],
        val_best=Statistic.over(run["val_loss_best"] for run in runs),
        val_final=Statistic.over(run["val_loss_final"] for run in runs),
        test=Statistic.over(run["test_loss"] for run in runs),
        latency_ms=_latency(runs, "median"),
        latency_q1=_latency(runs, "q1"),
        latency_q3=_latency(runs, "q3"),
        latency_ratio=ratio if math.isfinite(ratio) else None,
        tokens_per_second=sum(run["tokens"] for run in whole) / seconds if seconds else math.nan,
        peak_memory_bytes=max(peaks, default=None),
    )


def _is_finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def _latency(runs: list[Run], key: str) -> float:
    finite = [float(run["latency_ms"][key]) for run in runs if math.isfinite(run["latency_ms"][key])]
    return statistics.median(finite) if finite else math.nan


def leader(summaries: Sequence[MethodSummary], name: LossName) -> MethodSummary | None:
    """Returns the method whose loss is lowest beyond noise, or None.

    Beyond noise: its interval mean ± std overlaps no other method's, and none of its own runs failed. So there is no
    leader with one seed, and none among fewer than two methods.
    """
    finite = [summary for summary in summaries if summary.loss(name).count]
    if len(finite) < 2:
        return None
    best = min(finite, key=lambda summary: summary.loss(name).mean)
    if best.loss(name).count < best.num_seeds:
        return None
    rivals = [summary for summary in finite if summary is not best]
    return None if any(best.loss(name).overlaps(rival.loss(name)) for rival in rivals) else best
