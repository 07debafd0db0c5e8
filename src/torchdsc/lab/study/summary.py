"""A study's results as a table: a row for each variant, with differences to a reference and their intervals."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from torchdsc.lab.intervals import Difference, format_difference, format_mean, paired_difference
from torchdsc.lab.tables import DASH, markdown_table

__all__ = [
    "TRIAL_HEAD",
    "Comparison",
    "VariantRow",
    "format_settings",
    "reference_of",
    "summarize",
    "table_cells",
    "table_head",
    "to_markdown",
    "trial_cells",
]

Run = Mapping[str, Any]


@dataclass(frozen=True)
class Comparison:
    """The comparison of a variant with another.

    Attributes:
        other: Name of the other variant.
        difference: Difference of final validation losses, paired by seed.
        share_of_steps: Share of the training steps after which the variant's mean validation loss reaches the other's
            final one, interpolated linearly between evaluations; None if it never does.
    """

    other: str
    difference: Difference
    share_of_steps: float | None


@dataclass(frozen=True)
class VariantRow:
    """One variant over its seeds.

    Attributes:
        name: The variant.
        description: Its widths in words.
        params_total: Parameters stored.
        params_active: Parameters that one token uses.
        chosen: Settings of its best trial.
        valid: Final validation losses, nats per token, one a seed.
        test: Test losses, none where the study leaves the test part alone.
        comparisons: With each variant that it is compared to and that has runs; none with itself.
    """

    name: str
    description: str
    params_total: int
    params_active: int
    chosen: dict[str, Any]
    valid: list[float]
    test: list[float]
    comparisons: list[Comparison]


def reference_of(results: Mapping[str, Any]) -> str:
    """The variant that others are compared to: the study's choice, or the first."""
    config = results["config"]
    chosen: str = config["reference"] or config["variants"][0]["name"]
    return chosen


def summarize(results: Mapping[str, Any]) -> list[VariantRow]:
    """One row a variant that has runs, in the study's order."""
    by_name: dict[str, list[Run]] = {}
    for run in results["runs"]:
        by_name.setdefault(run["variant"], []).append(run)
    rows = []
    for variant in results["config"]["variants"]:
        name = variant["name"]
        own = by_name.get(name, [])
        if not own:
            continue
        others = [
            other
            for other in ([reference_of(results)] if variant["against"] is None else variant["against"])
            if other in by_name and other != name
        ]
        rows.append(
            VariantRow(
                name=name,
                description=own[0]["description"],
                params_total=own[0]["params_total"],
                params_active=own[0]["params_active"],
                chosen=results["chosen"][name],
                valid=[run["val_loss_final"] for run in own],
                test=[run["test_loss"] for run in own if run["test_loss"] is not None],
                comparisons=[
                    Comparison(other, _difference(own, by_name[other]), _share_of_steps(own, by_name[other]))
                    for other in others
                ],
            )
        )
    return rows


def _difference(own: Sequence[Run], others: Sequence[Run]) -> Difference:
    losses = {run["seed"]: run["val_loss_final"] for run in others}
    pairs = [run["val_loss_final"] - losses[run["seed"]] for run in own if run["seed"] in losses]
    return paired_difference({"all": pairs} if pairs else {})


def _share_of_steps(own: Sequence[Run], others: Sequence[Run]) -> float | None:
    target = fmean(run["val_loss_final"] for run in others)
    before: tuple[float, float] | None = None
    for points in zip(*(run["curve"] for run in own), strict=True):
        step, loss = points[0]["step"], fmean(point["val_loss"] for point in points)
        if loss <= target:
            if before is not None:
                step -= (step - before[0]) * (target - loss) / (before[1] - loss)
            share: float = step / own[0]["steps"]
            return share
        before = step, loss
    return None


def to_markdown(results: Mapping[str, Any]) -> str:
    """The table as GitHub markdown: of the runs, or of the trials where there are no others."""
    if not results["runs"]:
        return markdown_table(TRIAL_HEAD, trial_cells(results), left=(0, 1))
    rows = [[cell.replace("\n", ", ") for cell in table_cells(row, results)] for row in summarize(results)]
    return markdown_table(table_head(results), rows, left=(0, 1))


TRIAL_HEAD = ["Variant", "settings", "validation loss"]


def trial_cells(results: Mapping[str, Any]) -> list[list[str]]:
    """Rows of text, one a trial."""
    settings = {variant["name"]: variant["trials"] for variant in results["config"]["variants"]}
    return [
        [t["variant"], format_settings(settings[t["variant"]][t["trial"]]), f"{t['val_loss_final']:.3f}"]
        for t in results["trials"]
    ]


def table_head(results: Mapping[str, Any]) -> list[str]:
    """Titles of the columns of :func:`table_cells`."""
    losses = ("validation loss", "test loss", f"vs {reference_of(results)}")
    return ["Variant", "best trial", "total", "active", *losses, "steps to that loss"]


def table_cells(row: VariantRow, results: Mapping[str, Any]) -> list[str]:
    """One row of the table as text; what stands beside several other variants is in several lines."""
    reference = reference_of(results)
    names = ["" if c.other == reference else f" (vs {c.other})" for c in row.comparisons]
    differences = [format_difference(c.difference, 3) + name for c, name in zip(row.comparisons, names, strict=True)]
    shares = [DASH if c.share_of_steps is None else f"{c.share_of_steps:.0%}" for c in row.comparisons]
    return [
        row.name,
        format_settings(row.chosen) or DASH,
        f"{row.params_total:,}",
        f"{row.params_active:,}",
        format_mean(row.valid, 3),
        format_mean(row.test, 3),
        "\n".join(differences) or DASH,
        "\n".join(shares) or DASH,
    ]


def format_settings(settings: Mapping[str, Any]) -> str:
    """ "learning_rate 0.004, aux_weight 0.01"."""
    parts = (format_settings(v) if isinstance(v, Mapping) else f"{k} {v}" for k, v in settings.items())
    return ", ".join(parts)
