"""The report's sections, from the result to how it was made."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torchdsc.lab import figures
from torchdsc.lab.summaries import METHOD_LABELS, LossName, MethodSummary, Run, leader
from torchdsc.lab.tables import (
    DASH,
    DEVIATION_NOTE,
    HEADER,
    LOSS_COLUMNS,
    TIMES,
    format_loss,
    format_millions,
    format_ratio,
    table_cells,
)

from .findings import Difference, checks, differences, format_signed, join_words, routing_findings
from .html import Html, details, figure, grid, listing, method_name, paragraph, section, table, terms, text


def facts(runs: Sequence[Run], summaries: Sequence[MethodSummary]) -> Html:
    """Returns what the comparison consists of, as a short list of terms."""
    seeds = sorted({run["seed"] for run in runs})
    totals = sorted({summary.params_total for summary in summaries})
    batch = runs[0]["latency_ms"].get("batch")
    sizes = " to ".join(format_millions(total) for total in (totals[0], totals[-1])[: len(totals)])
    entries = {
        "Corpus": _distinct(run["corpus"].get("name", DASH) for run in runs),
        "Training": f"{_distinct(run['steps'] for run in runs)} steps, "
        f"{_distinct(format_millions(run['tokens']) for run in runs)} tokens",
        "Seeds": ", ".join(str(seed) for seed in seeds),
        "Total parameters": sizes,
        "Batch timed": f" {TIMES} ".join(str(size) for size in batch) + " tokens" if batch else DASH,
    }
    return terms(entries)


def _distinct(values: Iterable[object]) -> str:
    return " / ".join(dict.fromkeys(f"{value:,}" if isinstance(value, int) else str(value) for value in values))


def results(runs: Sequence[Run], summaries: Sequence[MethodSummary]) -> Html:
    """Returns the table, what to be wary of, and the differences seed by seed."""
    leaders = {column: leader(summaries, name) for column, name in LOSS_COLUMNS.items()}
    rows = []
    for summary in summaries:
        cells = [_stack(cell) for cell in table_cells(summary)]
        cells[0] = method_name(summary.method, summary.label, summary.description)
        for column, winner in leaders.items():
            if winner is summary:
                cells[column] = Html(f"<strong>{cells[column]}</strong>")
        rows.append([*cells, _rate(summary.tokens_per_second), _memory(summary.peak_memory_bytes)])
    head = [*HEADER, "trained tokens/s", "peak memory"]
    notes = [DEVIATION_NOTE] if any(summary.num_seeds > 1 for summary in summaries) else []
    if any(leaders.values()):
        notes.append("Bold: lowest by more than that, its interval meeting no other.")
    return section(
        "results",
        "Results",
        listing(checks(runs, summaries), "warnings"),
        table("Loss per token (nats), and what it costs", head, rows, "results"),
        paragraph(" ".join(notes), "note") if notes else "",
        _differences(runs, summaries),
    )


def _differences(runs: Sequence[Run], summaries: Sequence[MethodSummary]) -> str:
    subject, others = differences(runs, summaries)
    if not others:
        return ""
    head = ["Against", "val loss", "seed by seed", "verdict", "test loss", "latency", "active parameters"]
    rows = [_difference_row(other) for other in others]
    return table(f"{subject.label} against each other method: differences in loss, ratios of cost", head, rows)


def _difference_row(other: Difference) -> list[object]:
    seeds = ", ".join(f"{format_signed(value)} ({seed})" for seed, value in other.by_seed.items())
    latency = format_ratio(other.latency if math.isfinite(other.latency) else None)
    losses = [format_signed(other.val), seeds or DASH, other.verdict, format_signed(other.test)]
    return [other.against, *losses, latency, format_ratio(other.active)]


def curves(runs: Sequence[Run], summaries: Sequence[MethodSummary]) -> Html:
    """Returns the learning curves, whole and zoomed."""
    reading = _losses_in_words(summaries, "val_final")
    band = "Line: mean over seeds; band: lowest to highest." if len({run["seed"] for run in runs}) > 1 else ""
    whole = figure("curves", figures.loss_curves(runs), "Validation loss over training.", band, reading)
    drawings = [whole]
    if any(len(run["curve"]) > 2 for run in runs):
        zoom = figures.loss_curves(runs, zoom=True)
        drawings.append(figure("zoom", zoom, "The last half.", "The same, enlarged.", reading))
    return section("learning", "Learning", grid(*drawings))


def _losses_in_words(summaries: Sequence[MethodSummary], name: LossName) -> str:
    values = [f"{item.label} {format_loss(item.loss(name), item.num_seeds)}" for item in summaries]
    return f"{'Final' if name == 'val_final' else 'Best'} validation losses: {join_words(values)}."


def costs(runs: Sequence[Run], summaries: Sequence[MethodSummary]) -> Html:
    """Returns loss against parameters and against latency."""
    timed = [summary for summary in summaries if summary.latency_ratio is not None and summary.method != "dense"]
    ratios = [f"{summary.label} {format_ratio(summary.latency_ratio)}" for summary in timed]
    against = f"Time of a forward pass against Dense: {join_words(ratios)}." if ratios else "Left and low is better."
    reading = _losses_in_words(summaries, "val_best")
    size = figures.loss_against_parameters(runs)
    speed = figures.loss_against_latency(runs)
    return section(
        "cost",
        "What the loss costs",
        grid(
            figure("parameters", size, "Loss against parameters.", "Lower is better; dots are single seeds.", reading),
            figure("latency", speed, "Loss against latency.", against, reading),
        ),
    )


def routing(runs: Sequence[Run]) -> Html:
    """Returns the health of the routing: sentences, warnings, figures and the numbers of each layer."""
    findings = routing_findings(runs)
    if not findings:
        return Html("")
    readings = [Html(f"{method_name(item.method, METHOD_LABELS[item.method])}: {text(item.text)}") for item in findings]
    warnings = [f"{METHOD_LABELS[item.method]}: {warning}" for item in findings for warning in item.warnings]
    drawings = [
        figure(
            "utilization",
            figures.utilization_history(runs),
            "Atoms or experts in use.",
            "Share selected at least once on the validation windows, mean over layers.",
        )
    ]
    if any(_layers(run, "gate") for run in runs):
        caption = "Near 0 the layer adds nothing; near 1 the gate is a constant."
        drawings.append(figure("gate", figures.gate_history(runs), "Strength and gate.", caption))
    return section(
        "routing",
        "Health of the routing",
        listing(readings, "readings"),
        listing(warnings, "warnings") or paragraph("No layer is collapsed, and no gate saturated.", "note"),
        grid(*drawings),
        grid(*(_load_figure(runs, item.method) for item in findings), columns=3),
        details("Every layer", table("Routing of each layer at the end of training", _LAYER_HEAD, _layer_rows(runs))),
    )


def _load_figure(runs: Sequence[Run], method: str) -> Html:
    title = f"{METHOD_LABELS[method]}: load of each layer."
    caption = "Level is even use, steep is use of a few; later layers are stronger."
    return figure(f"load-{method}", figures.load_distribution(runs, method), title, caption)


_LAYER_HEAD = ["Method", "seed", "layer", "atoms or experts", "in use", "effective", "strength S", "gate tanh S"]


def _layers(run: Run, key: str) -> list[Mapping[str, Any]]:
    return [layer for layer in (run["routing"] or {}).get("layers", []) if layer.get(key) is not None]


def _layer_rows(runs: Sequence[Run]) -> list[list[object]]:
    return [
        [
            method_name(run["method"], METHOD_LABELS[run["method"]]),
            run["seed"],
            index + 1,
            f"{layer['num_atoms']:,}",
            f"{layer['utilization']:.1%}",
            f"{layer['effective_atoms']:,.1f}",
            *(DASH if layer.get(key) is None else f"{layer[key]:.3f}" for key in ("strength", "gate")),
        ]
        for run in runs
        for index, layer in enumerate(_layers(run, "num_atoms"))
    ]


def every_run(runs: Sequence[Run]) -> Html:
    """Returns one row per run."""
    head = ["Method", "seed", "val loss (best)", "val loss (final)", "test loss"]
    head += ["latency (ms)", "peak memory", "training", "tokens", "steps"]
    rows = [
        [
            method_name(run["method"], METHOD_LABELS[run["method"]]),
            run["seed"],
            *(_loss(run[key]) for key in ("val_loss_best", "val_loss_final", "test_loss")),
            f"{run['latency_ms']['median']:.2f}" if math.isfinite(run["latency_ms"]["median"]) else DASH,
            _memory(run["peak_memory_bytes"]),
            _duration(run["train_seconds"]),
            format_millions(run["tokens"]),
            f"{run['steps']:,}",
        ]
        for run in runs
    ]
    return section("runs", "Every run", table("One row per method and seed", head, rows))


def provenance(runs: Sequence[Run]) -> Html:
    """Returns how to make this again: command, commit, corpus, versions, hardware and configuration."""
    commands = "\n".join(dict.fromkeys(run["command"] for run in runs))
    made: dict[str, object] = {"commit": _distinct(run["commit"] for run in runs)}
    for name in ("corpus", "versions", "hardware"):
        flat = [flatten(run[name], f"{name}.") for run in runs]
        made |= {
            key: _distinct(one[key] for one in flat if key in one) for key in dict.fromkeys(k for f in flat for k in f)
        }
    same, varying = split_config(runs)
    parts = [
        Html(f"<pre><code>{text(commands)}</code></pre>"),
        table("Where and with what", ["what", "value"], list(made.items()), "keys"),
    ]
    if same:
        parts.append(
            details("Configuration of all runs", table("Same in every run", ["option", "value"], same, "keys"))
        )
    if varying:
        methods = list(dict.fromkeys(run["method"] for run in runs))
        head = ["option", *(METHOD_LABELS[method] for method in methods)]
        rows = [[key, *(values.get(method, DASH) for method in methods)] for key, values in varying]
        caption = "Options that differ between runs; several values of a method are those of its seeds"
        parts.append(details("Configuration by method", table(caption, head, rows, "keys")))
    return section("made", "Make it again", *parts)


def flatten(value: object, prefix: str = "") -> dict[str, str]:
    """Flattens nested mappings to dotted keys, with values as text (strings as they are, the rest as JSON)."""
    if isinstance(value, Mapping):
        pairs = [flatten(item, f"{prefix}{key}.") for key, item in value.items()]
        return {key: item for pair in pairs for key, item in pair.items()}
    return {prefix.rstrip("."): value if isinstance(value, str) else json.dumps(value, default=str)}


def split_config(runs: Sequence[Run]) -> tuple[list[tuple[str, str]], list[tuple[str, dict[str, str]]]]:
    """Splits the runs' options into those with one value in all runs, and the others with their values by method."""
    flat = [(run["method"], flatten(run["config"])) for run in runs]
    same: list[tuple[str, str]] = []
    varying: list[tuple[str, dict[str, str]]] = []
    for key in dict.fromkeys(key for _, config in flat for key in config):
        values = [config.get(key) for _, config in flat]
        if values[0] is not None and len(set(values)) == 1:
            same.append((key, values[0]))
            continue
        by_method: dict[str, list[str]] = {}
        for method, config in flat:
            if key in config:
                by_method.setdefault(method, []).append(config[key])
        varying.append((key, {method: ", ".join(dict.fromkeys(found)) for method, found in by_method.items()}))
    return same, varying


def _loss(value: float | None) -> str:
    return "NaN" if value is None or not math.isfinite(value) else f"{value:.4f}"


def _stack(cell: str) -> Html:
    """Puts what stands in parentheses on a line of its own."""
    first, mark, second = cell.partition(" (")
    return Html(f"{text(first)}<small>{text(mark.strip() + second)}</small>" if mark else text(first))


def _rate(tokens_per_second: float) -> str:
    return f"{tokens_per_second:,.0f}" if math.isfinite(tokens_per_second) else DASH


def _memory(size: int | None) -> str:
    return DASH if size is None else f"{size / 2**30:.2f} GiB"


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02} min"
    return f"{minutes} min {seconds:02} s" if minutes else f"{seconds} s"
