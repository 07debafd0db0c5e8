"""The report of a study: one HTML page that stands by itself."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from matplotlib.figure import Figure

from torchdsc.lab.figures.labels import label_ends
from torchdsc.lab.figures.style import COLORS, MARKERS, add_axes, new_figure, pad_limits
from torchdsc.lab.report.html import Html, details, figure, grid, paragraph, section, table, terms, text
from torchdsc.lab.report.template import PAGE, style_sheet

from .summary import TRIAL_HEAD, VariantRow, reference_of, summarize, table_cells, table_head, trial_cells

__all__ = ["render_report"]


def render_report(results: Mapping[str, Any]) -> str:
    """The page as text; the same results give the same page."""
    rows, every = summarize(results), [*results["runs"], *results["trials"]]
    settings = results["config"]["settings"]
    facts = {
        "Corpus": Path(settings.get("corpus", "embedded")).name,
        "Steps": f"{every[0]['steps']:,}",
        "Seeds": ", ".join(map(str, results["config"]["seeds"])) or "trials alone",
        "Trials": str(len(results["trials"])),
    }
    parts = [
        _losses(results, rows) if rows else Html(""),
        _pictures(results, rows),
        _trials(results),
        _provenance(results),
    ]
    return PAGE.substitute(
        title="A study of layers",
        style=style_sheet(),
        headline=text(_headline(results, rows)),
        facts=terms(facts),
        main="\n".join(part for part in parts if part),
    )


def _headline(results: Mapping[str, Any], rows: Sequence[VariantRow]) -> str:
    found = {row.name: fmean(row.valid) for row in rows}
    if not rows:
        for trial in results["trials"]:
            name, loss = trial["variant"], trial["val_loss_final"]
            found[name] = min(found.get(name, loss), loss)
    best = min(found, key=lambda name: found[name])
    where = "" if rows else " in a trial"
    return f"{best} has the lowest validation loss of {len(found)} variants{where}, {found[best]:.3f} nats per token."


def _losses(results: Mapping[str, Any], rows: Sequence[VariantRow]) -> Html:
    body = [
        [Html(f"{text(row.name)}<small>{text(row.description)}</small>"), *table_cells(row, results)[1:]]
        for row in rows
    ]
    notes = (
        "Losses in nats per token; ± is the sample standard deviation over seeds, for differences the half width of "
        "their 95 % interval, paired by seed. Trials saw the validation part alone."
    )
    return section(
        "losses", "Losses", table("Final losses", table_head(results), body, "results"), paragraph(notes, "note")
    )


def _pictures(results: Mapping[str, Any], rows: Sequence[VariantRow]) -> Html:
    reading = "; ".join(f"{row.name} {fmean(row.valid):.3f}" for row in rows)
    drawings = []
    if rows:
        caption = "Final validation loss, one mark a seed."
        drawings.append(figure("losses", _dots(results, rows), caption, "Lower is better.", reading))
    if results["trials"]:
        drawings.append(figure("rates", _rates(results), "Trials by learning rate.", "Lower is better.", reading))
    return section("pictures", "Pictures", grid(*drawings))


def _method(results: Mapping[str, Any], name: str) -> str:
    method: str = next(v["method"] for v in results["config"]["variants"] if v["name"] == name)
    return method


def _dots(results: Mapping[str, Any], rows: Sequence[VariantRow]) -> Figure:
    drawing = new_figure()
    axes = add_axes(drawing, "", "validation loss")
    for place, row in enumerate(rows):
        method = _method(results, row.name)
        axes.plot([place] * len(row.valid), row.valid, MARKERS[method], color=COLORS[method], markersize=5)
    axes.set_ylim(*pad_limits([value for row in rows for value in row.valid]))
    axes.set_xlim(-0.5, len(rows) - 0.5)
    ends = [(fmean(row.valid), row.name, COLORS[_method(results, row.name)]) for row in rows]
    label_ends(axes, ends)
    return drawing


def _rates(results: Mapping[str, Any]) -> Figure:
    drawing = new_figure()
    axes = add_axes(drawing, "learning rate", "validation loss of trials")
    axes.set_xscale("log")
    ends, shown = [], []
    for variant in results["config"]["variants"]:
        best: dict[float, float] = {}
        for trial in results["trials"]:
            if trial["variant"] == variant["name"]:
                rate, loss = trial["config"]["learning_rate"], trial["val_loss_final"]
                best[rate] = min(best.get(rate, loss), loss)
        if best:
            points = sorted(best.items())
            color = COLORS[variant["method"]]
            axes.plot(*zip(*points, strict=True), marker=MARKERS[variant["method"]], color=color, markersize=5)
            ends.append((points[-1][1], variant["name"], color))
            shown += list(best.values())
    axes.set_ylim(*pad_limits(shown))
    rates = sorted({trial["config"]["learning_rate"] for trial in results["trials"]})
    axes.set_xticks(rates, [f"{rate:g}" for rate in rates])
    label_ends(axes, ends)
    return drawing


def _trials(results: Mapping[str, Any]) -> Html:
    if not results["trials"]:
        return Html("")
    return section("trials", "Trials", table("Final validation loss of every trial", TRIAL_HEAD, trial_cells(results)))


def _provenance(results: Mapping[str, Any]) -> Html:
    keys = ("commit", "command", "versions", "hardware")
    every = [*results["trials"], *results["runs"]]
    made = {key: list(dict.fromkeys(json.dumps(run[key], sort_keys=True) for run in every)) for key in keys}
    return section(
        "made",
        "How it was made",
        paragraph(f"Differences are to {reference_of(results)}."),
        details("Commits, commands, versions and hardware", Html(f"<pre>{text(json.dumps(made, indent=1))}</pre>")),
        details("Configuration", Html(f"<pre>{text(json.dumps(results['config'], indent=1))}</pre>")),
    )
