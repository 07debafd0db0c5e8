"""The report of a study: one HTML page that stands by itself."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from torchdsc.lab.report.html import Html, details, figure, grid, paragraph, section, table, terms, text
from torchdsc.lab.report.template import PAGE, style_sheet

from .figures import draw_differences, draw_losses, draw_rates
from .summary import TRIAL_HEAD, VariantRow, reference_of, summarize, table_cells, table_head, trial_cells

__all__ = ["render_report"]


def render_report(results: Mapping[str, Any]) -> str:
    """The page as text; the same results give the same page."""
    rows, steps = summarize(results), {run["steps"] for run in results["runs"] or results["trials"]}
    settings = results["config"]["settings"]
    facts = {
        "Corpus": Path(settings.get("corpus", "embedded")).name,
        "Steps": ", ".join(f"{count:,}" for count in sorted(steps)),
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
    body = []
    for row in rows:
        cells = [Html(text(cell).replace("\n", "<br>")) for cell in table_cells(row, results)]
        body.append([Html(f"{cells[0]}<small>{text(row.description)}</small>"), *cells[1:]])
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
        drawings.append(figure("losses", draw_losses(results, rows), caption, "Lower is better.", reading))
    if any(row.comparisons for row in rows):
        caption = "Differences of validation losses, with 95 % intervals over seeds."
        drawings.append(figure("differences", draw_differences(results, rows), caption, "Left is better.", reading))
    if results["trials"]:
        drawings.append(figure("rates", draw_rates(results), "Trials by learning rate.", "Lower is better.", reading))
    return section("pictures", "Pictures", grid(*drawings))


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
