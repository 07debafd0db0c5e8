"""The table of a comparison, one row per method: as cells, as markdown and on the terminal."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

from torchdsc.lab.summaries import LossName, MethodSummary, Statistic, leader, summarize

if TYPE_CHECKING:
    from rich.console import Console

__all__ = [
    "format_latency",
    "format_loss",
    "format_millions",
    "format_ratio",
    "markdown_table",
    "print_table",
    "summarize",
    "table_cells",
    "to_markdown",
]

TIMES, DASH, MINUS = "\N{MULTIPLICATION SIGN}", "\N{EN DASH}", "\N{MINUS SIGN}"

DEVIATION_NOTE = (
    f"± is the sample standard deviation over seeds (divisor n {MINUS} 1). "
    "The paper's is the population one (divisor n): for two seeds 0.71 times this."
)


def format_loss(value: Statistic, num_seeds: int) -> str:
    """Formats "5.126 ± 0.006", without ± for one seed; says how many seeds were finite where some were not."""
    if not value.count:
        return "NaN"
    text = f"{value.mean:.3f}" if value.std is None else f"{value.mean:.3f} ± {value.std:.3f}"
    return text if value.count == num_seeds else f"{text} ({value.count} of {num_seeds} finite)"


def format_latency(summary: MethodSummary) -> str:
    """Formats "51.20 (50.90–51.70)": the median and the quartiles in milliseconds, or a dash where not timed."""
    if not math.isfinite(summary.latency_ms):
        return DASH
    return f"{summary.latency_ms:.2f} ({summary.latency_q1:.2f}{DASH}{summary.latency_q3:.2f})"


def format_ratio(ratio: float | None) -> str:
    """Formats "1.28×", or a dash where there is nothing to compare with."""
    return DASH if ratio is None else f"{ratio:.2f}{TIMES}"


def format_millions(count: float) -> str:
    """Formats "35.01 M" of parameters or tokens; "0.054 M" below a tenth of a million."""
    millions = count / 1e6
    return f"{millions:,.2f} M" if millions >= 0.1 or not count else f"{millions:.2g} M"


HEADER = (
    *("Method", "total", "active", "val loss (best)", "val loss (final)", "test loss"),
    *("latency ms/batch (quartiles)", "vs Dense"),
)
LOSS_COLUMNS: dict[int, LossName] = {3: "val_best", 4: "val_final", 5: "test"}


def table_cells(summary: MethodSummary) -> list[str]:
    """Returns one row of the table as text, under `HEADER`."""
    return [
        summary.label,
        format_millions(summary.params_total),
        format_millions(summary.params_active),
        *(format_loss(summary.loss(name), summary.num_seeds) for name in LOSS_COLUMNS.values()),
        format_latency(summary),
        format_ratio(summary.latency_ratio),
    ]


def to_markdown(summaries: Sequence[MethodSummary]) -> str:
    """Returns the table as GitHub markdown, with a note on ± below it.

    A loss is bold only where `leader` says that it is lowest beyond noise. Runs that diverged are named below it.
    """
    leaders = {column: leader(summaries, name) for column, name in LOSS_COLUMNS.items()}
    rows = []
    for summary in summaries:
        cells = table_cells(summary)
        for column, winner in leaders.items():
            if winner is summary:
                cells[column] = f"**{cells[column]}**"
        rows.append([*cells, summary.description])
    markdown = markdown_table([*HEADER, "layer"], rows, left=(0, len(HEADER)))
    return "\n".join([markdown, *(f"{note}\n" for note in notes(summaries))])


def notes(summaries: Sequence[MethodSummary]) -> list[str]:
    """Returns what stands below the table: which runs diverged, and what ± is."""
    diverged = [
        f"{summary.label} seed {seed}" + (f" (at step {step:,})" if step is not None else "")
        for summary in summaries
        for seed, step in summary.diverged.items()
    ]
    found = [f"Diverged, so that the loss is not finite: {', '.join(diverged)}."] if diverged else []
    return found + ([DEVIATION_NOTE] if any(summary.num_seeds > 1 for summary in summaries) else [])


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]], *, left: Sequence[int] = (0,)) -> str:
    """Returns a table as GitHub markdown; columns are right-aligned but for those in `left`."""
    rule = "|" + "".join(":--|" if column in left else "--:|" for column in range(len(head)))
    return "\n".join([_markdown_row(head), rule, *map(_markdown_row, rows)]) + "\n"


def _markdown_row(cells: Iterable[str]) -> str:
    return "| " + " | ".join(" ".join(cell.split()).replace("|", "\\|") for cell in cells) + " |"


def _stack(cell: str) -> str:
    """Breaks a cell or title into lines at the places where it reads best."""
    for place in (" \N{PLUS-MINUS SIGN}", " (", " loss", " Dense", " ms"):
        cell = cell.replace(place, "\n" + place[1:])
    return cell


def print_table(summaries: Sequence[MethodSummary], console: Console | None = None) -> None:
    """Prints the table on a terminal, the layers' sizes and the runs that diverged below it.

    Args:
        summaries: What `summarize` returned.
        console: Where to print; a new console on standard output by default.
    """
    try:
        from rich import box
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text
    except ImportError as error:
        raise ImportError("print_table needs rich: pip install 'torchdsc[lab]'") from error

    leaders = {column: leader(summaries, name) for column, name in LOSS_COLUMNS.items()}

    def build(shape: Callable[[str], str], gap: int) -> Table:
        table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, gap, 0, 0))
        for index, title in enumerate(HEADER):
            table.add_column(shape(title), justify="right" if index else "left")
        for summary in summaries:
            styles = ["bold" if leaders.get(column) is summary else "" for column in range(len(HEADER))]
            cells = map(shape, table_cells(summary))
            table.add_row(*(Text(cell, style) for cell, style in zip(cells, styles, strict=True)))
        return table

    console = console or Console()
    table = build(str, 1)
    fits = console.measure(table).maximum < console.width  # What is wider measures as the console's width.
    console.print(table if fits else build(_stack, 0))
    for summary in summaries:
        console.print(Text(f"{summary.label}: {summary.description}"), style="dim", highlight=False)
    for note in notes(summaries):
        console.print(Text(note), style="dim", highlight=False)
