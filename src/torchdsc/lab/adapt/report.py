"""The report of a study: one HTML page that stands by itself."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

from torchdsc.lab.figures.style import COLORS, FONT_SIZE, add_axes, new_figure, pad_limits
from torchdsc.lab.intervals import format_difference
from torchdsc.lab.report.html import Html, details, figure, grid, paragraph, section, table, terms, text
from torchdsc.lab.report.template import PAGE, style_sheet
from torchdsc.lab.tables import DASH

from .config import Task
from .summary import MethodRow, reference_of, summarize, table_cells, table_head

__all__ = ["render_report"]

# Colours by kind of method; those of the comparison keep theirs.
_COLORS = {"dsc": COLORS["dsc"], "mixture_of_loras": COLORS["mixture_of_loras"], "full": COLORS["dense"]}
_OTHERS = COLORS["moe"]


def render_report(results: Mapping[str, Any]) -> str:
    """The page as text; the same results give the same page."""
    rows, config = summarize(results), results["config"]
    tasks = [task["name"] for task in config["tasks"]]
    parts = [_results(results, rows), _pictures(results, rows), _trials(results), _provenance(results)]
    title = f"Adapting {config['base']}"
    return PAGE.substitute(
        title=text(title),
        style=style_sheet(),
        headline=text(_headline(rows)),
        facts=_facts(results, tasks),
        main="\n".join(part for part in parts if part),
    )


def _headline(rows: Sequence[MethodRow]) -> str:
    finite = [row for row in rows if math.isfinite(row.mean)]
    if not finite:
        return "No method has a finite score."
    best = max(finite, key=lambda row: row.mean)
    if len(rows) == 1:
        return f"{best.name} scores {best.mean:.2f}."
    sentence = f"{best.name} scores highest of {len(rows)} methods, {best.mean:.2f} on average"
    if best.against is None or best.against.half_width is None:
        return f"{sentence}."
    sure = abs(best.against.mean) > best.against.half_width
    verdict = "beyond" if sure else "within"
    return f"{sentence}: {format_difference(best.against, 2)} to {best.other}, {verdict} the 95 % interval."


def _facts(results: Mapping[str, Any], tasks: Sequence[str]) -> Html:
    config, methods = results["config"], results["config"]["methods"]
    entries = {
        "Tasks": ", ".join(tasks),
        "Seeds of a method": _span(len(method["seeds"] or config["seeds"]) for method in methods),
        "Training": f"{_span(run['steps'] for run in results['runs'])} steps of {config['batch_size']}",
        "Learning rates tried": _span(len(method["learning_rates"] or config["learning_rates"]) for method in methods),
    }
    return terms(entries)


def _span(values: Iterable[int]) -> str:
    """ "3 to 10", or the only value."""
    found = sorted(set(values))
    return f"{found[0]:,}" if len(found) == 1 else f"{found[0]:,} to {found[-1]:,}"


def _results(results: Mapping[str, Any], rows: Sequence[MethodRow]) -> Html:
    reference = reference_of(results)
    body = [[_name(results, row.name), *table_cells(row, results)[1:]] for row in rows]
    metrics = {task["name"]: Task(**task).scored_by for task in results["config"]["tasks"]}
    notes = (
        "± is the sample standard deviation over seeds; against the reference, the half width of the 95 % interval of "
        "the mean over these tasks, paired by seed. Metrics, in points: "
        + ", ".join(f"{name} {metric}" for name, metric in metrics.items())
        + f". Times and memory of a training step are those over {reference}'s."
        + (
            ""
            if results["trials"]
            else " Learning rates were not tuned: this is no comparison of the methods at their best."
        )
    )
    title = "Scores, and what they cost"
    return section(
        "results",
        "Results",
        table(title, table_head(results), body, "results"),
        paragraph(notes, "note"),
        _forgetting(results),
    )


def _forgetting(results: Mapping[str, Any]) -> str:
    runs = [run for run in results["runs"] if "retain_loss_after" in run]
    rows = [
        [_name(results, run["method"]), run["task"], run["seed"], f"{run['loss']:.3f}"]
        + [f"{run[key]:.3f}" for key in ("retain_loss_before", "retain_loss_after")]
        for run in runs
    ]
    head = ["Method", "task", "seed", "new domain", "old domain before", "after"]
    return table("Loss on the new and the old domain (nats per token)", head, rows) if rows else ""


def _name(results: Mapping[str, Any], name: str) -> Html:
    method = next(method for method in results["config"]["methods"] if method["name"] == name)
    run = next((run for run in results["runs"] if run["method"] == name), None)
    options = run["config"]["method"]["options"] if run else method["options"]
    words = ", ".join(f"{key} {value}" for key, value in options.items() if key != "target_modules")
    return Html(f"{text(name)}<small>{text(words)}</small>" if words else text(name))


def _color(results: Mapping[str, Any], name: str) -> str:
    kind = next(method["kind"] for method in results["config"]["methods"] if method["name"] == name)
    return _COLORS.get(kind, _OTHERS)


def _pictures(results: Mapping[str, Any], rows: Sequence[MethodRow]) -> Html:
    if len(rows) < 2:
        return Html("")
    reading = "; ".join(f"{row.name} {row.mean:.2f} at {row.adapter_bytes:,.0f} bytes" for row in rows)
    drawings = [
        figure("size", _score_against_bytes(results, rows), "Score against size.", "Left and high is better.", reading)
    ]
    if any(row.step_ratio is not None for row in rows):
        drawings.append(
            figure(
                "time", _score_against_time(results, rows), "Score against time.", "Left and high is better.", reading
            )
        )
    return section("pictures", "What the score costs", grid(*drawings))


def _score_against_bytes(results: Mapping[str, Any], rows: Sequence[MethodRow]) -> Figure:
    points = [(row.adapter_bytes / 1024, row) for row in rows]
    sizes = [size for size, _ in points]
    return _scatter(results, points, "saved weights (KiB)", logarithmic=max(sizes) > 10 * min(sizes))


def _score_against_time(results: Mapping[str, Any], rows: Sequence[MethodRow]) -> Figure:
    points = [(row.step_ratio, row) for row in rows if row.step_ratio is not None]
    return _scatter(results, points, f"time of a training step over {reference_of(results)}'s", logarithmic=False)


def _scatter(
    results: Mapping[str, Any], points: Sequence[tuple[float, MethodRow]], xlabel: str, *, logarithmic: bool
) -> Figure:
    drawing = new_figure()
    axes = add_axes(drawing, xlabel, "mean score")
    if logarithmic:
        axes.set_xscale("log")
    low, high = pad_limits([row.mean for _, row in points])
    axes.set_ylim(low, high)
    # Labels stand right of the axes, in the order of the scores, so that none covers another.
    step = (high - low) / max(12, len(points))
    heights = _spread([row.mean for _, row in points], step)
    for (x, row), height in zip(points, heights, strict=True):
        color = _color(results, row.name)
        axes.plot([x], [row.mean], marker="o", color=color, markersize=7)
        axes.annotate(
            row.name,
            (x, row.mean),
            (1.02, (height - low) / (high - low)),
            textcoords="axes fraction",
            color=color,
            fontsize=FONT_SIZE,
            va="center",
            arrowprops={"arrowstyle": "-", "color": COLORS["grid"], "linewidth": 0.8},
        )
    return drawing


def _spread(values: Sequence[float], step: float) -> list[float]:
    """Heights near the values with at least ``step`` between them."""
    order = sorted(range(len(values)), key=lambda index: values[index])
    heights = list(values)
    last = -math.inf
    for index in order:
        heights[index] = last = max(values[index], last + step)
    overflow = max(0.0, last - max(values))
    return [height - overflow for height in heights]


def _trials(results: Mapping[str, Any]) -> Html:
    if not results["trials"]:
        return Html("")
    rates = sorted({trial["learning_rate"] for trial in results["trials"]})
    rows = []
    for name, chosen in results["rates"].items():
        cells = []
        for rate in rates:
            scores = [t["score"] for t in results["trials"] if (t["method"], t["learning_rate"]) == (name, rate)]
            mean = f"{sum(scores) / len(scores):.2f}" if scores else DASH
            cells.append(Html(f"<strong>{mean}</strong>") if rate == chosen else mean)
        rows.append([_name(results, name), *cells])
    tasks = list(dict.fromkeys(trial["task"] for trial in results["trials"]))
    caption = f"Mean score on held-out training examples of {', '.join(tasks)}, by learning rate; bold is in use"
    return section("tuning", "Tuning", table(caption, ["Method", *(f"{rate:g}" for rate in rates)], rows))


def _provenance(results: Mapping[str, Any]) -> Html:
    runs = results["runs"]
    rows = [
        [_name(results, run["method"]), run["task"], run["seed"], f"{run['score']:.2f}", f"{run['params_trainable']:,}"]
        for run in runs
    ]
    keys = ("commit", "command", "versions", "hardware")
    made = {key: list(dict.fromkeys(json.dumps(run[key], sort_keys=True) for run in runs)) for key in keys}
    return section(
        "runs",
        "Every run, and how it was made",
        details("Every run", table("One row a run", ["Method", "task", "seed", "score", "trained parameters"], rows)),
        details("Commit, commands, versions and hardware", Html(f"<pre>{text(json.dumps(made, indent=1))}</pre>")),
        details("Configuration", Html(f"<pre>{text(json.dumps(results['config'], indent=1))}</pre>")),
    )
