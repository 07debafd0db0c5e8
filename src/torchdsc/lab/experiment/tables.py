"""The tables of results: as markdown, and those of a report."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from torchdsc.lab.figures.looks import Group
from torchdsc.lab.files import write_text
from torchdsc.lab.tasks.task import Measure, Record

from .intervals import DASH, MINUS, TIMES, format_interval, format_mean
from .results import Results
from .summary import Comparison, Row, summarize
from .words import format_ratio, format_settings

__all__ = [
    "Table",
    "difference_table",
    "result_tables",
    "run_tables",
    "table",
    "time_table",
    "to_markdown",
    "trial_table",
    "write_table",
]

# Columns of the first table, and rows that a table may have without being folded away.
_COLUMNS, _UNFOLDED = 6, 24


def table(results: Results, rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Head and rows of text, one a variant; what stands beside several others is in several lines."""
    task, cases = results.task, list(results.experiment.cases)
    measure = results.measure
    has_trials = any(len(variant.trials) > 1 for variant in results.experiment.variants)
    columns = [c for c in task.columns if any(c.value(run) is not None for row in rows for run in row.runs)]
    is_timed, has_memory = any(row.time for row in rows), any(row.memory for row in rows)
    has_shares = any(c.share_of_steps for row in rows for c in row.comparisons)
    head = ["Variant", *(["best trial"] if has_trials else []), *(column.title for column in columns)]
    head += [*cases, "mean"] if len(cases) > 1 else [measure.name]
    head += ["difference", "verdict", *(["steps to its end"] if has_shares else [])]
    reference = results.experiment.chosen_reference
    head += [f"{task.timed_words} over {reference}'s"] if is_timed else []
    head += ["its peak memory"] if has_memory else []
    body = []
    for row in rows:
        cells = [row.name, *([format_settings(row.trial) or DASH] if has_trials else [])]
        for column in columns:
            found = [value for run in row.runs if (value := column.value(run)) is not None]
            finite = [value for value in found if math.isfinite(value)]
            text = column.text(finite) if finite else "NaN" if found else DASH
            cells.append(MINUS + text[1:] if text.startswith("-") else text)
        cells += [format_mean(list(row.values.get(case, {}).values()), measure.decimals) for case in cases]
        cells += [format_mean([row.mean], measure.decimals)] if len(cases) > 1 else []
        lines: list[list[str]] = [[], [], []]
        for c in row.comparisons:
            lines[0].append(f"{format_interval(c.difference, measure.decimals)} to {c.other}")
            lines[1].append(c.verdict)
            lines[2].append(DASH if c.share_of_steps is None else f"{c.share_of_steps:.0%}")
        cells += ["\n".join(line) or DASH for line in lines[: 3 if has_shares else 2]]
        cells += [format_ratio(row.time)] if is_timed else []
        cells += [DASH if row.memory is None else f"{row.memory:.2f}{TIMES}"] if has_memory else []
        body.append(cells)
    return head, body


def trial_table(results: Results) -> tuple[list[str], list[list[str]]]:
    """Head and rows of text, one a trial: the mean over its cases."""
    measure, body = results.measure, []
    for variant in results.experiment.variants:
        for trial in variant.trials if len(variant.trials) > 1 else []:
            own = [t for t in results.trials if t["variant"] == variant.name and t["trial"] == trial]
            mean = format_mean([fmean(t[measure.key] for t in own)] if own else [], measure.decimals)
            chosen = "chosen" if results.chosen[variant.name] == trial else ""
            body.append([variant.name, format_settings(trial) or "as it is", mean, chosen])
    return ["Variant", "settings", measure.name, ""], body


def to_markdown(results: Results, rows: Sequence[Row]) -> str:
    """The table as GitHub markdown: of the variants, or of the trials where there are no others."""
    head, body = table(results, rows) if rows else trial_table(results)
    lines = [head, ["--:" if index else ":--" for index in range(len(head))], *body]
    return "".join(
        "| " + " | ".join(cell.replace("\n", "; ").replace("|", "\\|") for cell in line) + " |\n" for line in lines
    )


def write_table(results: Results, folder: Path) -> list[Row]:
    """Write ``table.md``; returns its rows."""
    rows = summarize(results)
    write_text(folder / "table.md", to_markdown(results, rows))
    return rows


@dataclass(frozen=True)
class Table:
    """What a table of the page shows.

    Attributes:
        caption: What is in it.
        head: Titles of its columns.
        parts: Titles and rows; cells are text, or the comparisons of a variant.
        kind: On narrow screens the rows of "cards" are stacked, "wide" ones scroll; "keys" are set like code.
    """

    caption: str
    head: Sequence[str]
    parts: Sequence[tuple[str, Sequence[Sequence[Any]]]]
    kind: str = "cards"

    @classmethod
    def of(
        cls, caption: str, head: Sequence[str], rows: Sequence[Sequence[str]], kind: str = "cards"
    ) -> "Table | None":
        """Without columns in which no row has anything; None without rows."""
        kept = [i for i in range(len(head)) if i == 0 or any(row[i] not in ("", DASH) for row in rows)]
        parts = [("", [[row[i] for i in kept] for row in rows])]
        return cls(caption, [head[i] for i in kept], parts, kind) if rows else None

    @property
    def is_long(self) -> bool:
        """Whether it is folded away."""
        return sum(len(rows) for _, rows in self.parts) > _UNFOLDED


def result_tables(results: Results, rows: Sequence[Row], groups: Sequence[Group]) -> list[Table]:
    """What decides first, then further figures; without rows, the best trial of each variant."""
    task, measure = results.task, results.measure
    if not rows:
        head, body = trial_table(results)
        best = Table.of("The best trial of each variant", head[:-1], [row[:-1] for row in body if row[-1]])
        return [best] if best else []
    head, body = table(results, rows)
    # The columns are: name, trial, those of the task, cases, the measure, the difference, its verdict, costs.
    difference, titles = head.index("difference"), [column.title for column in task.columns]
    first = [0, difference - 1, *([difference] if any(row.comparisons for row in rows) else [])]
    first += [i for i in range(difference + 2, len(head)) if head[i] != "steps to its end"]
    first += [i for i in range(1, difference) if head[i] in titles][: _COLUMNS - len(first)]
    rest = [0, *(i for i in range(1, difference) if i not in first)]
    lines: dict[str, list[Any]] = {}
    for row, line in zip(rows, body, strict=True):
        lines[row.name] = [*line[:difference], row.comparisons, *line[difference + 1 :]]
    better = "lower" if measure.lower_is_better else "higher"
    found = []
    for caption, columns in (
        (f"The {measure.name} in {measure.unit}; {better} is better", first),
        ("Further figures", rest),
    ):
        parts = [
            (group.title, [[line[i] for i in columns] for name, line in lines.items() if name in group.names])
            for group in groups
        ]
        found += [Table(caption, [head[i] for i in columns], parts)] if len(columns) > 1 else []
    return found


def difference_table(results: Results, rows: Sequence[Row]) -> Table | None:
    """A row a comparison."""
    head = ["Variant", "compared to", "difference", "seed by seed", "verdict", "on the test part", "steps to its end"]
    head += [f"{results.task.timed_words}, ratio", "size, ratio"]
    decimals = results.measure.decimals
    cells = [[row.name, *_difference_cells(found, decimals)] for row in rows for found in row.comparisons]
    return Table.of("Differences, paired by seed", head, cells)


def _difference_cells(found: Comparison, decimals: int) -> list[str]:
    seeds = [f"{seed}:\N{NO-BREAK SPACE}{value:+.{decimals}f}" for seed, value in found.by_seed.items()]
    return [
        found.other,
        format_interval(found.difference, decimals),
        ", ".join(seeds).replace("-", MINUS) if len(seeds) > 1 else "",
        found.verdict,
        format_interval(found.test, decimals),
        DASH if found.share_of_steps is None else f"{found.share_of_steps:.0%}",
        format_ratio(found.time),
        DASH if found.size is None else f"{found.size:.2f}{TIMES}",
    ]


def time_table(results: Results, rows: Sequence[Row]) -> Table | None:
    """A row for each variant that was timed."""
    ratio = f"ratio to {results.experiment.chosen_reference}"
    head = ["Variant", "median (ms)", "quartiles (ms)", ratio, "peak memory"]
    cells = [
        [
            *(row.name, f"{timing['median']:.2f}", f"{timing['q1']:.2f} to {timing['q3']:.2f}"),
            *(format_ratio(row.time), _memory(timing["peak_memory_bytes"])),
        ]
        for row in rows
        if (timing := results.timing.get(row.name))
    ]
    return Table.of(f"Time of a {results.task.timed_words}, in turn with the others", head, cells)


def run_tables(results: Results) -> list[Table]:
    """A row a run, and a row a failed one."""
    measure = results.measure
    runs = [run for variant in results.experiment.variants for run in results.runs if run["variant"] == variant.name]
    bests = [run.get(f"{measure.curve}_best") for run in runs]
    differ = any(best not in (None, run[measure.key]) for best, run in zip(bests, runs, strict=True))
    head = ["Variant", "case", "seed", "trial", measure.name, "its best", "on the test part", "steps", "training"]
    head += ["peak memory", "diverged at step"]
    cells = [
        [
            *(*_job(run), _figure(run[measure.key], measure), _figure(best, measure) if differ else ""),
            _figure(run.get(measure.test), measure) if measure.test else "",
            *(f"{run['steps']:,}", _duration(run["train_seconds"]), _memory(run["peak_memory_bytes"])),
            str(run["diverged_at_step"] or ""),
        ]
        for run, best in zip(runs, bests, strict=True)
    ]
    failed = [[*_job(run), run["error"]] for run in results.failed]
    found = [
        Table.of("A row for each variant, case and seed", head, cells),
        Table.of("Runs that failed", [*head[:4], "error"], failed),
    ]
    return [table for table in found if table]


def _job(run: Record) -> tuple[str, str, str, str]:
    return run["variant"], run["case"], str(run["seed"]), format_settings(run["trial"])


def _figure(value: float | None, measure: Measure) -> str:
    if value is None:
        return DASH
    return f"{value:.{measure.decimals + 1}f}".replace("-", MINUS) if math.isfinite(value) else "NaN"


def _memory(size: int | None) -> str:
    return DASH if size is None else f"{size / 2**30:.2f} GiB"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02} min"
    return f"{minutes} min {rest:02} s" if minutes else f"{rest} s"
