"""The report of an experiment: one HTML page that stands by itself, from its results alone.

The words of the page are in ``page.html.j2``, which asks :class:`Page` for what is said and drawn.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import zip_longest
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from matplotlib.figure import Figure

from torchdsc.lab.figures.costs import Cost, draw_costs
from torchdsc.lab.figures.differences import draw_differences
from torchdsc.lab.figures.lines import draw_curves, draw_rates
from torchdsc.lab.figures.loads import draw_load_history, draw_loads
from torchdsc.lab.figures.looks import NAMED, Group, Look, choose_looks
from torchdsc.lab.figures.series import Series
from torchdsc.lab.figures.style import PALETTE, to_svg
from torchdsc.lab.files import write_text
from torchdsc.lab.tasks.task import Column, Record

from . import findings, routing, summary, tables, words
from .intervals import TIMES, Interval, format_interval
from .provenance import provenance_tables
from .results import Results
from .tables import Table

__all__ = ["REPORT", "render_report", "write_report"]

REPORT = "report.html"
# Sizes that differ by less than this share are one place in a figure.
_ONE_PLACE = 0.05


def write_report(results: Results, folder: Path) -> Path:
    """Write ``report.html`` into a folder, whole or not at all; returns its path."""
    file = folder / REPORT
    write_text(file, render_report(results))
    return file


def render_report(results: Results) -> str:
    """The page, which loads nothing; the same results give the same page. All that comes from records is escaped."""
    loader = FileSystemLoader(Path(__file__).parent)
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    page = Page(results)
    text = environment.get_template("page.html.j2").render(
        page=page,
        headline=findings.headline(results, page.rows),
        doubts=findings.doubts(results, page.rows),
        result_tables=tables.result_tables(results, page.rows, page.groups),
        difference_table=tables.difference_table(results, page.rows),
        time_table=tables.time_table(results, page.rows),
        trial_table=Table.of(f"{page.measure.name.capitalize()} of every trial", *tables.trial_table(results)),
        run_tables=tables.run_tables(results),
        provenance_tables=provenance_tables(page.records),
        routing=routing,
        format_interval=format_interval,
        palette=PALETTE,
        num_named=NAMED,
    )
    return text.strip() + "\n"


class Page:
    """An experiment as its page shows it.

    Attributes:
        records: Of runs and trials.
        rows: Of the variants that have runs.
        runs: By variant, where it has any; likewise "trials", and "routed", runs with records of a routing.
        groups: Variants that figures and tables show together: all, where they are few, or those of like size.
        methods: Of the library, by variant; likewise "looks".
        has_seeds: Whether a variant has two seeds or more.
        has_active: Whether a variant has parameters that are not active.
        has_task_loss: Whether the training loss is known without regularisers.
        costs: Columns of the task that the measure is drawn against.
        has_paths: Whether a run was measured again at less of what it learnt.
        named_best: Variants that one figure may name.
    """

    def __init__(self, results: Results) -> None:
        self.experiment, self.timing = results.experiment, results.timing
        self.costs = [column for column in results.task.columns if column.cost]
        self.measure, self.timed_words = results.measure, results.task.timed_words
        self.records = [*results.runs, *results.trials]
        self.rows = summary.summarize(results)
        names = [variant.name for variant in self.experiment.variants]
        self.title = self.experiment.title or ", ".join(names[:4]) + (" and others" if names[4:] else "")
        self.runs = {row.name: row.runs for row in self.rows}
        self.trials = _by_variant(names, results.trials)
        every_run = [run for own in self.runs.values() for run in own]
        self.routed = _by_variant(names, [run for run in every_run if (run["routing"] or {}).get("layers")])
        self.groups = self._group()
        firsts = {name: own[0] for name, own in (self.runs or self.trials).items()}
        self.methods = {name: str(record.get("method", "")) for name, record in firsts.items()}
        self.looks = choose_looks(self.methods, self.groups, self.experiment.chosen_reference)
        self.has_seeds = any(len(by_seed) > 1 for row in self.rows for by_seed in row.values.values())
        self.has_active = any(run.get("params_active", row.size) != row.size for row in self.rows for run in row.runs)
        self.has_paths = any(run.get("scaled") for run in every_run)
        self.has_task_loss = any("task_loss" in point for run in every_run for point in run["train_curve"])
        # The reference, and the best of each group in turn.
        ranks = zip_longest(*(group.names for group in self.groups))
        best = [name for rank in ranks for name in rank if name and self.looks[name].is_named]
        self.named_best = sorted(best, key=lambda name: name != self.experiment.chosen_reference)[:NAMED]
        self._num_drawn = 0

    def _group(self) -> list[Group]:
        if not self.rows:
            losses = {name: [self._loss(trial[self.measure.key]) for trial in own] for name, own in self.trials.items()}
            return [Group("", sorted(losses, key=lambda name: min(losses[name])))] if losses else []
        is_one = len(self.rows) <= NAMED and len({run["steps"] for row in self.rows for run in row.runs}) == 1
        groups = [self.rows] if is_one else summary.like_sized(self.rows)
        titled = [(summary.describe_group(group), group) for group in groups if len(group) > 1]
        alone = [row for group in groups if len(group) == 1 for row in group]
        titled += [("Of other sizes", alone)] if alone else []
        ranked = [(title, sorted(group, key=lambda row: self._loss(row.mean))) for title, group in titled]
        return [Group(title if titled[1:] else "", [row.name for row in group]) for title, group in ranked]

    def _loss(self, value: float) -> float:
        """Of the measure, the lower the better; infinite where a run diverged."""
        loss = value if self.measure.lower_is_better else -value
        return loss if math.isfinite(value) else math.inf

    @property
    def facts(self) -> dict[str, str]:
        """What the experiment consists of."""
        seeds, records = self.experiment.seeds, self.records
        data = list(dict.fromkeys(name for record in records for name in record["data"]))
        counts = sorted({len(variant.seeds or seeds) for variant in self.experiment.variants})
        batches = sorted({tuple(timing["batch"]) for timing in self.timing.values() if timing})
        steps, sizes = {record["steps"] for record in records}, sorted(row.size for row in self.rows)
        num_trials = sum(map(len, self.trials.values()))
        values = {
            "Variants": str(len(self.experiment.variants)),
            "Data": ", ".join(Path(name).name for name in data) if len(data) < 4 else f"{len(data)} files",
            "Cases": ", ".join(filter(None, self.experiment.cases)),
            "Training": f"{words.format_span(sorted(steps))} steps" if steps else "",
            "Seeds": ", ".join(map(str, seeds)) if len(counts) == 1 else f"{words.format_span(counts)} a variant",
            "Parameters": words.format_span([words.format_millions(size) for size in sizes]),
            "Trials": f"{num_trials:,}" if num_trials else "",
            "Batch timed": " or ".join(f" {TIMES} ".join(map(str, batch)) for batch in batches),
        }
        if not any(counts):
            values["Seeds"] = "none: trials alone"
        return {name: value for name, value in values.items() if value}

    def svg(self, drawing: Figure, words: str, names: Sequence[str]) -> Markup:
        """A figure as part of the page.

        Args:
            drawing: The figure.
            words: Of its text alternative, which says too what the measure of the variants in it is.
            names: Of those variants.
        """
        self._num_drawn += 1
        means = {row.name: f"{row.mean:.{self.measure.decimals}f}" for row in self.rows}
        reading = "; ".join(f"{name} {means[name]}" for name in names if name in means)
        words += f" {self.measure.name}: {reading}." if reading else ""
        return Markup(to_svg(drawing, f"figure-{self._num_drawn}", words))

    def draw_differences(self, group: Group) -> Figure | None:
        """Between variants of a group and those they are compared to."""
        rows = [row for row in self.rows if row.name in group.names]
        return draw_differences(rows, self.looks, self.measure)

    def draw_curves(self, group: Group, curve: str, key: str, name: str, **options: Any) -> Figure | None:
        """A quantity over the training of a group's variants.

        Args:
            group: The variants.
            curve: Where the points are in a record: "curve", "train_curve" or "routing".
            key: Where the quantity is in a point.
            name: Of the quantity.
            options: Of :func:`~torchdsc.lab.figures.lines.draw_curves`.
        """

        def points(run: Record) -> dict[float, float | None]:
            found = (run["routing"] or {}).get("history", []) if curve == "routing" else run[curve]
            return {point["step"]: point[key] for point in found if key in point}

        series = {name: Series.collect(own, points) for name, own in self.runs.items() if name in group.names}
        return draw_curves(series, self.looks, name, **options)

    def draw_sizes(self) -> Figure | None:
        """The measure against parameters in millions, stored and active; None where all variants have as many."""
        sizes = {}
        for row in self.rows:
            size, active = row.size / 1e6, row.runs[0].get("params_active", row.size) / 1e6
            sizes[row.name] = size, (active, size)
        kinds = zip(*(ends for _, ends in sizes.values()), strict=True)
        if all(max(places) <= (1 + _ONE_PLACE) * min(places) for places in kinds):
            return None
        return self._draw_costs(sizes, "parameters (millions)")

    def draw_times(self) -> Figure | None:
        """The measure against time, as a ratio to that of the reference."""
        reference, times = self.experiment.chosen_reference, {}
        for row in self.rows:
            time = Interval(1.0) if row.name == reference and self.timing.get(reference) else row.time
            if time is not None:
                low, high = (time.mean if end is None else end for end in (time.low, time.high))
                times[row.name] = time.mean, (low, high)
        return self._draw_costs(times, f"{self.timed_words}, ratio to {reference}'s")

    def draw_cost(self, column: Column) -> Figure | None:
        """The measure against a column that is a cost: its mean over runs, and their range."""
        costs = {name: (fmean(values), (min(values), max(values))) for name, values in self._costs_of(column).items()}
        ranked = self.ranked_by(column)
        looks = choose_looks(self.methods, [Group("", ranked)], self.experiment.chosen_reference)
        named = [name for name in ranked if looks[name].is_named]
        paths = {row.name: self._path(column, row.runs) for row in self.rows}
        return self._draw_costs(costs, column.cost or column.title, looks, named, paths)

    def _path(self, column: Column, runs: Sequence[Record]) -> tuple[tuple[float, float], ...]:
        """What runs cost and reach in the mean where they were measured again, at less and less of what they learnt."""
        again = zip(*(run.get("scaled", ()) for run in runs), strict=False)
        found = [[(column.value(point), point[self.measure.key]) for point in points] for points in again]
        costs = [[cost for cost, _ in points if cost is not None] for points in found]
        reached = [[measure for _, measure in points] for points in found]
        return tuple((fmean(at), fmean(to)) for at, to in zip(costs, reached, strict=True) if at)

    def ranked_by(self, column: Column) -> list[str]:
        """Variants by measure and cost: first those that no other beats in both, then of the others likewise."""
        costs = self._costs_of(column)
        left = {row.name: (self._loss(row.mean), fmean(costs[row.name])) for row in self.rows if row.name in costs}
        ranked: list[str] = []
        while left:
            front = [name for name, own in left.items() if not any(_beats(other, own) for other in left.values())]
            ranked += sorted(front, key=lambda name: left[name])
            left = {name: own for name, own in left.items() if name not in front}
        return ranked

    def _costs_of(self, column: Column) -> dict[str, list[float]]:
        found = {}
        for row in self.rows:
            values = [value for run in row.runs if (value := column.value(run)) is not None and math.isfinite(value)]
            if values:
                found[row.name] = values
        return found

    def _draw_costs(
        self,
        costs: Mapping[str, tuple[float, tuple[float, float]]],
        xlabel: str,
        looks: Mapping[str, Look] | None = None,
        named: Sequence[str] | None = None,
        paths: Mapping[str, tuple[tuple[float, float], ...]] | None = None,
    ) -> Figure | None:
        reached = {row.name: row for row in self.rows if row.name in costs and math.isfinite(row.mean)}
        found = {name: Cost(*costs[name], row.mean, _deviation(row)) for name, row in reached.items()}
        for name, path in (paths or {}).items():
            if name in found:
                found[name] = replace(found[name], path=path)
        # What a run costs may differ by little and matter, where parameters and times are the same for many.
        apart, named = paths is None, named or self.named_best
        return draw_costs(found, looks or self.looks, named, xlabel, self.measure.name, side_by_side=apart)

    def draw_load(self, name: str) -> Figure | None:
        """How evenly a variant uses its atoms or experts, at the scale of all those that are named."""
        routed = {name: own for name, own in self.routed.items() if name in self.named_best}
        return draw_loads(routed, self.looks, name)

    def draw_load_history(self, name: str) -> Figure | None:
        """How that changed over training."""
        return draw_load_history(self.routed[name], self.looks[name])

    def draw_rates(self, group: Group) -> Figure | None:
        """What the best trial of each variant of a group reached by learning rate, in means over cases."""
        series = {name: self._by_rate(own) for name, own in self.trials.items() if name in group.names}
        return draw_rates(series, self.looks, self.measure.name, lower_is_better=self.measure.lower_is_better)

    def _by_rate(self, trials: Sequence[Record]) -> Series:
        cases: dict[tuple[float, str], list[float]] = {}
        for trial in trials:
            if "learning_rate" in trial["config"]:
                key = trial["config"]["learning_rate"], words.format_settings(trial["trial"])
                cases.setdefault(key, []).append(trial[self.measure.key])
        found: dict[float, float | None] = {}
        # The best comes last.
        for (rate, _), values in sorted(cases.items(), key=lambda item: self._loss(fmean(item[1])), reverse=True):
            found[rate] = fmean(values)
        return Series.of([found])


def _by_variant(names: Sequence[str], records: Sequence[Record]) -> dict[str, list[Record]]:
    """Records of each variant that has any."""
    found = {name: [record for record in records if record["variant"] == name] for name in names}
    return {name: own for name, own in found.items() if own}


def _beats(one: tuple[float, float], other: tuple[float, float]) -> bool:
    """Whether both of its figures are as low, and one is lower."""
    return one != other and one[0] <= other[0] and one[1] <= other[1]


def _deviation(row: summary.Row) -> float:
    """Over seeds, of the mean over cases; zero where there is one seed."""
    shared = set.intersection(*(set(by_seed) for by_seed in row.values.values()))
    means = [fmean(by_seed[seed] for by_seed in row.values.values()) for seed in shared]
    finite = [mean for mean in means if math.isfinite(mean)]
    return stdev(finite) if len(finite) > 1 else 0.0
