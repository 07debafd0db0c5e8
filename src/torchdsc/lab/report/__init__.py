"""The report of a comparison: one HTML page that stands by itself."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from torchdsc.lab.files import write_text
from torchdsc.lab.summaries import Run, check_runs, summarize

from . import sections
from .findings import headline, join_words
from .html import text
from .template import PAGE, style_sheet

__all__ = ["render_report", "write_report"]


def write_report(runs: Iterable[Run], folder: str | os.PathLike[str]) -> Path:
    """Writes `report.html` into a folder and returns its path.

    The page needs nothing else: figures are SVG inside it, and it loads no font, script or picture. It is written
    beside its name first and then moved there, so that a reader never finds half of it.

    Args:
        runs: Records of `results.json`, in any order; methods and seeds may be missing, losses may be NaN.
        folder: Where to write; made if it is not there.

    Raises:
        ValueError: If there are no runs, or they do not fit together; see `torchdsc.lab.summaries.check_runs`.
    """
    page = render_report(runs)
    target = Path(folder) / "report.html"
    write_text(target, page)
    return target


def render_report(runs: Iterable[Run]) -> str:
    """Returns the page of `write_report` as text; the same runs give the same page."""
    runs = check_runs(runs)
    summaries = summarize(runs)
    labels = join_words([summary.label for summary in summaries])
    main = [
        sections.results(runs, summaries),
        sections.curves(runs, summaries),
        sections.costs(runs, summaries),
        sections.routing(runs),
        sections.every_run(runs),
        sections.provenance(runs),
    ]
    return PAGE.substitute(
        title=text(f"{labels} at equal parameter budgets" if len(summaries) > 1 else f"{labels} language model"),
        style=style_sheet(),
        headline=text(headline(summaries)),
        facts=sections.facts(runs, summaries),
        main="\n".join(main),
    )
