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

from .summary import VariantRow, format_settings, reference_of, summarize, table_cells, table_head

__all__ = ["render_report"]


def render_report(results: Mapping[str, Any]) -> str:
    """The page as text; the same results give the same page."""
    rows = summarize(results)
    settings = results["config"]["settings"]
    facts = {
        "Corpus": Path(settings.get("corpus", "embedded")).name,
        "Steps": f"{results['runs'][0]['steps']:,}",
        "Seeds": ", ".join(map(str, results["config"]["seeds"])),
        "Trials": str(len(results["trials"])),
    }
    parts = [_losses(results, rows), _pictures(results, rows), _trials(results), _provenance(results)]
    return PAGE.substitute(
        title="A study of layers",
        style=style_sheet(),
        headline=text(_headline(rows)),
        facts=terms(facts),
        main="\n".join(part for part in parts if part),
    )


def _headline(rows: Sequence[VariantRow]) -> str:
    best = min(rows, key=lambda row: fmean(row.valid))
    return (
        f"{best.name} has the lowest validation loss of {len(rows)} variants, {fmean(best.valid):.3f} nats per token."
    )


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
    drawings = [
        figure("losses", _dots(results, rows), "Final validation loss, one mark a seed.", "Lower is better.", reading)
    ]
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
    rows = [
        [trial["variant"], format_settings(_trial_settings(results, trial)), f"{trial['val_loss_final']:.3f}"]
        for trial in results["trials"]
    ]
    if not rows:
        return Html("")
    return section(
        "trials", "Trials", table("Final validation loss of every trial", ["Variant", "settings", "loss"], rows)
    )


def _trial_settings(results: Mapping[str, Any], trial: Mapping[str, Any]) -> dict[str, Any]:
    variant = next(v for v in results["config"]["variants"] if v["name"] == trial["variant"])
    settings: dict[str, Any] = variant["trials"][trial["trial"]]
    return settings


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
