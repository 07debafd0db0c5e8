"""Learning curves, and what a loss costs in parameters and in time."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from torchdsc.lab.summaries import METHOD_LABELS, MethodSummary, Run, group_runs, summarize

from .labels import label_ends, label_points
from .series import Series, draw_series, format_steps, number
from .style import COLORS, MARKERS, add_axes, new_figure, pad_limits, say_empty


def loss_curves(runs: Iterable[Run], *, zoom: bool = False) -> Figure:
    """Draws validation loss over steps: the mean over seeds, a band from lowest to highest seed, and each seed thin.

    Args:
        runs: Run records.
        zoom: Show the last half of training only, with the mean's last value in the labels. Curves more than a quarter
            above the lowest loss may leave the frame then; an arrow says so.
    """
    groups = group_runs(runs)
    figure = new_figure()
    axes = add_axes(figure, "training step", "validation loss", margins=(46, 136 if not zoom else 156, 44, 26))
    curves = {
        method: Series.collect(group, lambda run: ((point["step"], point["val_loss"]) for point in run["curve"]))
        for method, group in groups.items()
    }
    last = max((series.steps[-1] for series in curves.values() if series.steps.size), default=0.0)
    if zoom:
        curves = {method: series.since(last / 2) for method, series in curves.items()}
    curves = {method: series for method, series in curves.items() if np.isfinite(series.values).any()}
    if not curves:
        say_empty(axes, "no finite validation loss")
        return figure
    for method, series in curves.items():
        draw_series(axes, series, method)
    axes.set_ylim(*_loss_limits(list(curves.values()), zoom))
    format_steps(axes, list(curves.values()))
    ends = [(series.end, _end_label(method, series, zoom), COLORS[method]) for method, series in curves.items()]
    label_ends(axes, ends)
    return figure


def _loss_limits(curves: Sequence[Series], zoom: bool) -> tuple[float, float]:
    """Limits that one exploding run cannot stretch."""
    values = np.concatenate([series.values.ravel() for series in curves])
    values = values[np.isfinite(values)]
    starts = [float(np.fmax.reduce(series.values[:, 0])) for series in curves]
    ceiling = 1.25 * values.min() if zoom else 1.05 * np.fmax.reduce([*starts, 1.25 * values.min()])
    return pad_limits([float(value) for value in values[values <= ceiling]], 0.05)


def _end_label(method: str, series: Series, with_value: bool) -> str:
    text = f"{METHOD_LABELS[method]} {series.end:.3f}" if with_value else METHOD_LABELS[method]
    return text if series.complete else f"{text} (NaN)"


def loss_against_parameters(runs: Iterable[Run]) -> Figure:
    """Draws best validation loss against parameters: active (hollow) and total (filled), joined by a line."""
    runs = list(runs)
    figure, axes, summaries = _cost_axes(runs, "parameters (millions): hollow active, filled total")
    if not summaries:
        return figure
    totals = {summary.method: summary.params_total / 1e6 for summary in summaries}
    actives = [summary.params_active / 1e6 for summary in summaries]
    axes.set_xlim(*pad_limits([*totals.values(), *actives], 0.12))
    bars = _draw_losses(axes, runs, summaries, totals)
    for summary, active in zip(summaries, actives, strict=True):
        total, loss, color = totals[summary.method], summary.val_best.mean, COLORS[summary.method]
        if active != total:
            axes.plot([active, total], [loss, loss], color=color, linewidth=1.2, alpha=0.6, zorder=2)
            axes.plot(
                [active],
                [loss],
                color=color,
                marker=MARKERS[summary.method],
                markerfacecolor="none",
                markersize=7,
                zorder=3,
            )
            bars.append(((active, loss), (total, loss)))
    _label_methods(axes, summaries, totals, bars)
    return figure


def loss_against_latency(runs: Iterable[Run]) -> Figure:
    """Draws best validation loss against the latency of a forward pass, with quartiles and deviation over seeds."""
    runs = list(runs)
    figure, axes, summaries = _cost_axes(runs, "forward pass of one batch (ms, median and quartiles)")
    summaries = [summary for summary in summaries if math.isfinite(summary.latency_ms)]
    if not summaries:
        return figure
    medians = {summary.method: summary.latency_ms for summary in summaries}
    quartiles = [quartile for summary in summaries for quartile in (summary.latency_q1, summary.latency_q3)]
    axes.set_xlim(*pad_limits([*medians.values(), *quartiles], 0.12))
    bars = _draw_losses(axes, runs, summaries, medians)
    for summary in summaries:
        loss, color = summary.val_best.mean, COLORS[summary.method]
        ends = (summary.latency_q1, summary.latency_q3)
        axes.plot(ends, [loss, loss], color=color, linewidth=1.2, zorder=2)
        bars.append(((ends[0], loss), (ends[1], loss)))
    _label_methods(axes, summaries, medians, bars)
    return figure


Segment = tuple[tuple[float, float], tuple[float, float]]


def _cost_axes(runs: Sequence[Run], xlabel: str) -> tuple[Figure, Axes, list[MethodSummary]]:
    summaries = [summary for summary in summarize(runs) if summary.val_best.count]
    figure = new_figure()
    axes = add_axes(figure, xlabel, "best validation loss", margins=(46, 12, 44, 26))
    if not summaries:
        say_empty(axes, "no finite validation loss")
        return figure, axes, []
    means = [summary.val_best for summary in summaries]
    ends = [value.mean + sign * (value.std or 0.0) for value in means for sign in (-1, 1)]
    losses = [number(run["val_loss_best"]) for run in runs]
    axes.set_ylim(*pad_limits([*ends, *losses], 0.15))
    return figure, axes, summaries


def _draw_losses(
    axes: Axes, runs: Sequence[Run], summaries: Sequence[MethodSummary], at: dict[str, float]
) -> list[Segment]:
    """Draws each method's mean, its deviation as a bar and its seeds as small dots; returns the bars."""
    bars: list[Segment] = []
    for run in runs:
        method = run["method"]
        if method in at:
            loss = [number(run["val_loss_best"])]
            axes.plot([at[method]], loss, ".", color=COLORS[method], markersize=5, alpha=0.55, zorder=3)
    for summary in summaries:
        x, value, color = at[summary.method], summary.val_best, COLORS[summary.method]
        axes.plot([x], [value.mean], color=color, marker=MARKERS[summary.method], markersize=8, zorder=4)
        if value.std is not None:
            ends = (value.mean - value.std, value.mean + value.std)
            axes.plot([x, x], ends, color=color, linewidth=1.2, zorder=2)
            bars.append(((x, ends[0]), (x, ends[1])))
    return bars


def _label_methods(
    axes: Axes, summaries: Sequence[MethodSummary], at: dict[str, float], bars: Sequence[Segment]
) -> None:
    axes.xaxis.set_major_locator(MaxNLocator(5))
    points = [(at[item.method], item.val_best.mean, item.label, COLORS[item.method]) for item in summaries]
    label_points(axes, points, bars)
