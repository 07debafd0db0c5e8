"""A study's results reduced to a row a method, with differences to a reference and their intervals."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median
from typing import Any

from torchdsc.lab.intervals import Difference, format_difference, format_mean, paired_difference
from torchdsc.lab.tables import DASH, TIMES, markdown_table

__all__ = [
    "MethodRow",
    "difference",
    "reference_of",
    "summarize",
    "table_cells",
    "table_head",
    "to_markdown",
]

Run = Mapping[str, Any]


@dataclass(frozen=True)
class MethodRow:
    """One method over tasks and seeds.

    Attributes:
        name: The method.
        rate: The learning rate in use.
        params_adapter: Trainable parameters of the adapter, heads left out.
        adapter_bytes: Size of the saved weights, heads included; the mean over tasks.
        scores: Scores by task, of each seed.
        mean: Mean over tasks of the mean over seeds.
        other: The method it is compared to.
        against: Difference to that; None for itself.
        step_ratio: Time of a training step over the reference's, round by round; None where not timed.
        peak_ratio: Peak memory of the process in a training step over the reference's.
    """

    name: str
    rate: float
    params_adapter: int
    adapter_bytes: float
    scores: dict[str, list[float]]
    mean: float
    other: str
    against: Difference | None
    step_ratio: float | None
    peak_ratio: float | None


def reference_of(results: Mapping[str, Any]) -> str:
    """The method that others are compared to: the study's choice, the first "lora", or the first method."""
    methods = results["config"]["methods"]
    chosen: str | None = results["config"]["reference"]
    loras = [method["name"] for method in methods if method["kind"] == "lora"]
    return chosen or (loras or [methods[0]["name"]])[0]


def difference(runs: Sequence[Run], name: str, reference: str) -> Difference:
    """Compare two methods over the tasks and seeds that both have.

    Args:
        runs: Records.
        name: A method.
        reference: Another.

    Returns:
        The difference; NaN where they share no task.
    """
    scores = {(run["method"], run["task"], run["seed"]): run["score"] for run in runs}
    paired: dict[str, list[float]] = {}
    for (method, task, seed), value in scores.items():
        if method == name and (reference, task, seed) in scores:
            paired.setdefault(task, []).append(value - scores[reference, task, seed])
    return paired_difference(paired)


def summarize(results: Mapping[str, Any]) -> list[MethodRow]:
    """One row a method, in the study's order."""
    runs, timing = results["runs"], results["timing"]
    reference = reference_of(results)
    rows = []
    for method in results["config"]["methods"]:
        name = method["name"]
        other = method.get("against") or reference
        own = [run for run in runs if run["method"] == name]
        if not own:
            continue
        scores: dict[str, list[float]] = {}
        for run in own:
            scores.setdefault(run["task"], []).append(run["score"])
        rows.append(
            MethodRow(
                name=name,
                rate=results["rates"][name],
                params_adapter=own[0]["params_adapter"],
                adapter_bytes=fmean(run["adapter_bytes"] for run in own),
                scores=scores,
                mean=fmean(fmean(values) for values in scores.values()),
                other=other,
                against=None if name == other else difference(runs, name, other),
                step_ratio=_step_ratio(timing, name, reference),
                peak_ratio=_peak_ratio(timing, name, reference),
            )
        )
    return rows


def _step_ratio(timing: Mapping[str, Any], name: str, reference: str) -> float | None:
    """Median of the ratios within rounds, whose samples belong together."""
    if name not in timing or reference not in timing:
        return None
    pairs = zip(timing[name]["samples"], timing[reference]["samples"], strict=True)
    ratio: float = median(own / other for own, other in pairs)
    return ratio


def _peak_ratio(timing: Mapping[str, Any], name: str, reference: str) -> float | None:
    if name not in timing or reference not in timing:
        return None
    peaks: list[float] = [timing[method]["peak_memory_bytes"] for method in (name, reference)]
    return peaks[0] / peaks[1]


def to_markdown(results: Mapping[str, Any]) -> str:
    """The table as GitHub markdown."""
    head, rows = table_head(results), [table_cells(row, results) for row in summarize(results)]
    return markdown_table(head, rows)


def table_head(results: Mapping[str, Any]) -> list[str]:
    """Titles of the columns of :func:`table_cells`."""
    tasks = (task["name"] for task in results["config"]["tasks"])
    costs = ("step time", "peak memory")
    head = ["Method", "adapter parameters", "saved bytes", "learning rate", *tasks, "mean"]
    return [*head, f"vs {reference_of(results)}", *costs]


def table_cells(row: MethodRow, results: Mapping[str, Any]) -> list[str]:
    """One row of the table as text."""
    tasks = (task["name"] for task in results["config"]["tasks"])
    return [
        row.name,
        f"{row.params_adapter:,}",
        f"{row.adapter_bytes:,.0f}",
        f"{row.rate:g}",
        *(format_mean(row.scores.get(task, []), 2) for task in tasks),
        f"{row.mean:.2f}",
        format_difference(row.against, 2) + ("" if row.other == reference_of(results) else f" (vs {row.other})"),
        *(DASH if ratio is None else f"{ratio:.2f}{TIMES}" for ratio in (row.step_ratio, row.peak_ratio)),
    ]
