"""What a comparison says, in sentences computed from its figures, and what to be wary of in it."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torchdsc.baselines.methods import METHODS
from torchdsc.lab.summaries import METHOD_LABELS, MethodSummary, Run, check_runs, group_runs, leader
from torchdsc.lab.tables import MINUS, format_loss, format_millions

UNEQUAL_BUDGETS = 0.02
"""Totals that differ by more than this share of the smallest are not equal budgets."""

PAST_BEST = 0.01
"""A final loss this share above the best one is worth a word."""

LOW_UTILIZATION, LOW_EFFECTIVE = 0.5, 0.1
"""Below these shares of a layer's atoms, in use or effective, the bank has collapsed onto few of them."""

GATE_SATURATED, GATE_COLLAPSED = 0.99, 0.05
"""A mean gate outside these passes on nothing of the strength, or nothing of the layer."""


@dataclass(frozen=True)
class Difference:
    """How one method differs from another; negative: the first is lower.

    Attributes:
        against: Label of the other method.
        by_seed: Difference in best validation loss for each seed that both have finite.
        val: Mean of `by_seed`; NaN where it is empty.
        test: Mean difference in test loss over the seeds that both have finite; NaN for none.
        latency: Ratio of the latencies; NaN where one was not timed.
        active: Ratio of the active parameters.
        verdict: "lower", "higher", "within noise", "one seed" or "not finite".
    """

    against: str
    by_seed: dict[int, float]
    val: float
    test: float
    latency: float
    active: float
    verdict: str


@dataclass(frozen=True)
class RoutingFinding:
    """The routing of one method at the end of training, in a phrase, and what is wrong with it."""

    method: str
    text: str
    warnings: tuple[str, ...]


def headline(summaries: Sequence[MethodSummary]) -> str:
    """Says who has the lowest best validation loss and by how much, against the noise of the seeds."""
    finite = [summary for summary in summaries if summary.val_best.count]
    if not finite:
        return "No run reached a finite validation loss."
    best, *rest = sorted(finite, key=lambda summary: summary.val_best.mean)
    loss = format_loss(best.val_best, best.num_seeds)
    if not rest:
        others = "no other method here" if len(summaries) == 1 else "no other method with a finite loss"
        return f"{best.label} reached a validation loss of {loss}. There is {others} to compare it with."
    margin = format_margin(rest[0].val_best.mean - best.val_best.mean)
    lowest = f"{best.label} has the lowest validation loss: {loss}, {margin} below {rest[0].label}"
    if leader(summaries, "val_best") is best:
        return f"{lowest}, more than the seeds vary."
    if best.val_best.count < best.num_seeds:
        return f"{lowest}. But not all of its runs stayed finite, so this settles nothing."
    single = [summary.label for summary in finite if summary.val_best.std is None]
    if single:
        of = "" if len(single) == len(finite) else f" of {join_words(single)}"
        return f"{lowest}. With one seed{of} this cannot be told from noise."
    level = [summary for summary in rest if best.val_best.overlaps(summary.val_best)]
    named = [f"{summary.label} ({format_loss(summary.val_best, summary.num_seeds)})" for summary in [best, *level]]
    return f"No clear winner: {join_words(named)} differ by no more than the seeds vary."


def differences(runs: Iterable[Run], summaries: Sequence[MethodSummary]) -> tuple[MethodSummary, list[Difference]]:
    """Compares DSC, or without it the method with the lowest loss, with every other method, seed by seed."""
    records = {(run["method"], run["seed"]): run for run in runs}
    finite = [summary for summary in summaries if summary.val_best.count] or list(summaries)
    chosen = [summary for summary in summaries if summary.method == "dsc"]
    subject = chosen[0] if chosen else min(finite, key=lambda summary: summary.val_best.mean)
    result = []
    for other in summaries:
        if other is subject:
            continue
        shared = [seed for seed in subject.seeds if seed in other.seeds]
        pairs = [(seed, records[subject.method, seed], records[other.method, seed]) for seed in shared]
        val = {
            seed: first["val_loss_best"] - second["val_loss_best"]
            for seed, first, second in pairs
            if _finite(first["val_loss_best"], second["val_loss_best"])
        }
        test = [
            first["test_loss"] - second["test_loss"]
            for _, first, second in pairs
            if _finite(first["test_loss"], second["test_loss"])
        ]
        result.append(
            Difference(
                against=other.label,
                by_seed=val,
                val=statistics.fmean(val.values()) if val else math.nan,
                test=statistics.fmean(test) if test else math.nan,
                latency=subject.latency_ms / (other.latency_ms or math.nan),
                active=subject.params_active / other.params_active,
                verdict=_verdict(subject, other),
            )
        )
    return subject, result


def _verdict(subject: MethodSummary, other: MethodSummary) -> str:
    first, second = subject.val_best, other.val_best
    if not first.count or not second.count:
        return "not finite"
    if first.std is None or second.std is None:
        return "one seed"
    if first.overlaps(second):
        return "within noise"
    return "lower" if first.mean < second.mean else "higher"


def checks(runs: Iterable[Run], summaries: Sequence[MethodSummary]) -> list[str]:
    """Says what makes the comparison incomplete or unfair: missing or failed runs, and runs that differ in set-up."""
    runs = check_runs(runs)
    seeds = sorted({run["seed"] for run in runs})
    missing = [f"{item.label} seed {seed}" for item in summaries for seed in seeds if seed not in item.seeds]
    found = [f"Not run, or not finished: {join_words(missing)}."] if missing else []
    failed = [_name(run) for run in runs if not _finite(run["val_loss_final"])]
    if failed:
        found.append(f"Training diverged: {join_words(failed)} ended with a validation loss that is not finite.")
    totals = [summary.params_total for summary in summaries]
    apart = max(totals) / min(totals) - 1
    if apart > UNEQUAL_BUDGETS:
        sizes = f"{format_millions(min(totals))} to {format_millions(max(totals))}"
        found.append(f"The parameter budgets are not equal: totals from {sizes}, {apart:.1%} apart.")
    for what, get in _SAME.items():
        values = {json.dumps(get(run), sort_keys=True, default=str) for run in runs}
        if len(values) > 1:
            found.append(f"The runs differ in {what}, so they do not compare like with like.")
    for run in runs:
        best, final = run["val_loss_best"], run["val_loss_final"]
        if _finite(best, final) and final - best > PAST_BEST * best:
            ends = f"{_name(run)} ends {final - best:.3f} above its best validation loss"
            found.append(f"{ends}: it overfitted or diverged.")
    return found


_SAME: dict[str, Callable[[Run], Any]] = {
    "tokens trained on": lambda run: run["tokens"],
    "training steps": lambda run: run["steps"],
    "corpus": lambda run: run["corpus"].get("sha256"),
    "hardware (which the latencies depend on)": lambda run: run["hardware"],
    "software versions": lambda run: run["versions"],
    "commit": lambda run: run["commit"],
    "the batch timed": lambda run: run["latency_ms"].get("batch"),
}


def routing_findings(runs: Iterable[Run]) -> list[RoutingFinding]:
    """Reads the routing of each method that has one, over the layers of all seeds."""
    return [
        _routing_finding(method, routed)
        for method, group in group_runs(runs).items()
        if (routed := [run for run in group if run["routing"] and run["routing"]["layers"]])
    ]


def _routing_finding(method: str, runs: Sequence[Run]) -> RoutingFinding:
    layers = [
        (f"layer {index + 1}, seed {run['seed']}", layer)
        for run in runs
        for index, layer in enumerate(run["routing"]["layers"])
    ]
    noun = METHODS[method].units
    used = {name: layer["utilization"] for name, layer in layers if _finite(layer["utilization"])}
    even = {name: layer["effective_atoms"] / layer["num_atoms"] for name, layer in layers}
    even = {name: share for name, share in even.items() if _finite(share)}
    gates = {name: layer["gate"] for name, layer in layers if _finite(layer.get("gate"))}
    strengths = [layer["strength"] for _, layer in layers if _finite(layer.get("strength"))]
    parts = []
    if used:
        parts.append(f"{_mean(used):.0%} of the {noun} in use (least in any layer: {min(used.values()):.0%})")
    if even:
        parts.append(f"effectively {_mean(even):.0%} of them (exp of the entropy of use)")
    if gates and strengths:
        parts.append(f"mean strength S {statistics.fmean(strengths):.2f}, gate tanh S {_mean(gates):.2f}")
    warnings = [
        *([] if used else ["how much of it is in use was not recorded."]),
        *_warn(used, LOW_UTILIZATION, f"use less than {LOW_UTILIZATION:.0%} of their {noun}: the rest is dead weight"),
        *_warn(even, LOW_EFFECTIVE, f"concentrate on the equivalent of less than {LOW_EFFECTIVE:.0%} of their {noun}"),
        *_warn(gates, GATE_COLLAPSED, "have a collapsed gate: they add next to nothing to the output"),
        *_warn(gates, GATE_SATURATED, "have a saturated gate: it is constant, and the strength S has no effect", True),
    ]
    return RoutingFinding(method, f"{'; '.join(parts) or 'nothing recorded'}.", tuple(warnings))


def _mean(values: dict[str, float]) -> float:
    return statistics.fmean(values.values())


def _warn(values: dict[str, float], bound: float, text: str, above: bool = False) -> list[str]:
    """Words a warning on the layers beyond a bound, with the worst of them; none where all are within."""
    beyond = {name: value for name, value in values.items() if (value > bound if above else value < bound)}
    if not beyond:
        return []
    worst = (max if above else min)(beyond, key=lambda name: beyond[name])
    return [f"{len(beyond)} of {len(values)} layers {text} (worst: {worst}, at {beyond[worst]:.4g})."]


def _name(run: Run) -> str:
    return f"{METHOD_LABELS[run['method']]} seed {run['seed']}"


def _finite(*values: float | None) -> bool:
    return all(value is not None and math.isfinite(value) for value in values)


def join_words(words: Sequence[str]) -> str:
    """Joins "a, b and c"."""
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def format_margin(value: float) -> str:
    """Formats a difference that is not negative: "0.046", or "less than 0.001"."""
    return f"{value:.3f}" if value >= 0.0005 else "less than 0.001"


def format_signed(value: float) -> str:
    """Formats "+0.012" or "−0.012" with a true minus sign; "NaN" where not finite."""
    return f"{value:+.3f}".replace("-", MINUS) if math.isfinite(value) else "NaN"
