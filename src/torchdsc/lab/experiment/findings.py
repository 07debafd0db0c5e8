"""What results say, in sentences: who is best, and what to be wary of."""

import json
import math
from collections.abc import Callable, Sequence
from typing import Any

from torchdsc.lab.tasks.task import Measure, Record

from .intervals import format_interval, format_mean, mean_difference
from .results import Results
from .summary import Row, describe_group, like_sized, ranked
from .words import join_words

__all__ = ["doubts", "headline"]

# Compared variants whose sizes differ by more than this share are not equal.
_UNEQUAL = 0.02
# A last loss this share above the best one is worth a word.
_PAST_BEST = 0.01
# Of the variants that are level with the best, the headline names as many.
_NAMED = 2


def headline(results: Results, rows: Sequence[Row]) -> list[str]:
    """Who is best among variants of like size, and whether that is decided: a sentence for each size."""
    measure = results.measure
    if not rows:
        return [_best_trial(results)]
    finite = [row for row in rows if math.isfinite(row.mean)]
    if not finite:
        return [f"No run reached a finite {measure.name}."]
    groups = [group for group in like_sized(finite) if len(group) > 1]
    if not groups:
        best = ranked(finite, measure)[0]
        differences = [
            f"{format_interval(c.difference, measure.decimals)} to {c.other} ({c.verdict})" for c in best.comparisons
        ]
        words = f"; {join_words(differences)}, of another size" if differences else "; there is none to compare it with"
        return [f"{best.name} reached a {measure.name} of {_mean(best, measure)}{words}."]
    sentences = [_sentence(group, measure, tell_size=len(groups) > 1) for group in groups]
    return [sentence[0].upper() + sentence[1:] for sentence in sentences]


def _sentence(group: Sequence[Row], measure: Measure, *, tell_size: bool) -> str:
    best, *rest = ranked(group, measure)
    at = f"At {describe_group(group)}: " if tell_size else ""
    word = "lowest" if measure.lower_is_better else "highest"
    level = [row for row in rest if not _is_decided(best, row)]
    if not level:
        difference = format_interval(mean_difference(best.values, rest[0].values), measure.decimals)
        return (
            f"{at}{best.name} has the {word} {measure.name} of {len(group)} variants, {_mean(best, measure)}: "
            f"{difference} (95 %) to {rest[0].name}."
        )
    named = [f"{row.name} ({_mean(row, measure)})" for row in (best, *level[:_NAMED])]
    named += [f"{len(level) - _NAMED} more"] if level[_NAMED:] else []
    is_single = all(len(by_seed) < 2 for row in group for by_seed in row.values.values())
    why = ", as one seed decides nothing" if is_single else ""
    better = [c for c in best.comparisons if c.verdict.endswith("better")]
    but = [f"{format_interval(c.difference, measure.decimals)} (95 %) to {c.other}" for c in better[:1]]
    return f"{at}no clear winner: {join_words(named)} are not told apart{why}" + (
        f"; {best.name} is {but[0]}." if but else "."
    )


def _is_decided(best: Row, other: Row) -> bool:
    if not best.is_whole:
        return False
    finite = {case: {s: v for s, v in by_seed.items() if math.isfinite(v)} for case, by_seed in other.values.items()}
    return mean_difference(best.values, finite).is_decided


def _best_trial(results: Results) -> str:
    measure, found = results.measure, list[tuple[float, str]]()
    for trial in results.trials:
        if math.isfinite(trial[measure.key]):
            found.append((trial[measure.key], trial["variant"]))
    if not found:
        return f"No trial reached a finite {measure.name}."
    value, name = (min if measure.lower_is_better else max)(found)
    word = "lowest" if measure.lower_is_better else "highest"
    count = len({trial["variant"] for trial in results.trials})
    return (
        f"{name} has the {word} {measure.name} in a trial of {count} variants, {value:.{measure.decimals}f}; "
        "single trials decide nothing between variants."
    )


def _mean(row: Row, measure: Measure) -> str:
    values = next(iter(row.values.values())) if len(row.values) == 1 else None
    return format_mean(list(values.values()) if values else [row.mean], measure.decimals)


def doubts(results: Results, rows: Sequence[Row]) -> list[str]:
    """What makes the comparison incomplete or unfair, in sentences."""
    measure, found = results.measure, list[str]()
    have = {row.name: row for row in rows}
    missing = []
    for variant in results.experiment.variants if rows else []:
        done = {(run["case"], run["seed"]) for run in have[variant.name].runs} if variant.name in have else set()
        seeds = variant.seeds or results.experiment.seeds
        wanted = {(case, seed) for case in results.experiment.cases for seed in seeds}
        missing += [variant.name] if wanted - done else []
    if missing:
        found.append(f"Not all runs are done: {join_words(missing)}.")
    found += [f"{_name(record)} failed: {record['error']}." for record in results.failed]
    runs = [run for row in rows for run in row.runs]
    diverged = [_name(run) for run in runs if not math.isfinite(run[measure.key])]
    if diverged:
        found.append(f"Training diverged: {join_words(diverged)} ended without a finite {measure.name}.")
    pairs = [(row, have[c.other], c) for row in rows for c in row.comparisons]
    unequal = [f"{a.name} and {b.name}" for a, b, c in pairs if c.size is None or abs(c.size - 1) > _UNEQUAL]
    if unequal:
        found.append(f"Compared variants are not of equal size: {join_words(unequal)}.")
    for what, get in _SAME.items():
        apart = [f"{a.name} and {b.name}" for a, b, _ in pairs if _all(a.runs, get) != _all(b.runs, get)]
        if apart:
            found.append(f"Compared variants differ in {what}: {join_words(apart)}.")
    for run in runs:
        best, last = run.get(f"{measure.curve}_best"), run[measure.key]
        if best is not None and math.isfinite(last) and abs(last - best) > _PAST_BEST * abs(best):
            found.append(f"{_name(run)} ends {abs(last - best):.{measure.decimals}f} past its best: it overfitted.")
    if not results.experiment.test and rows:
        found.append("Only the validation part was looked at.")
    return found


_SAME: dict[str, Callable[[Record], Any]] = {
    "training steps": lambda run: run["steps"],
    "data": lambda run: sorted(run["data"].values()),
    "software versions": lambda run: {k: v for k, v in run["versions"].items() if k != "torchdsc"},
}


def _all(runs: Sequence[Record], get: Callable[[Record], Any]) -> set[str]:
    return {json.dumps([run["case"], get(run)], sort_keys=True, default=str) for run in runs}


def _name(record: Record) -> str:
    case = f" on {record['case']}" if record["case"] else ""
    return f"{record['variant']}{case}, seed {record['seed']}"
