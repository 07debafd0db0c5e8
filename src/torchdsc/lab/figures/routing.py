"""The health of the routing: who is used, how strongly, and how evenly."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, PercentFormatter

from torchdsc.lab.summaries import METHOD_LABELS, Run, group_runs
from torchdsc.lab.tables import TIMES

from .labels import label_ends
from .series import Points, Series, draw_series, format_steps, number
from .style import COLORS, MARKERS, add_axes, new_figure, say_empty


def utilization_history(runs: Iterable[Run]) -> Figure:
    """Draws the share of atoms or experts selected at least once on the validation windows, over steps."""
    figure = new_figure()
    axes = add_axes(figure, "training step", "atoms or experts in use", margins=(46, 136, 44, 26))
    axes.set_ylim(0, 1.03)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.yaxis.set_major_locator(MaxNLocator(4))
    series = _history(runs, "utilization")
    for method, values in series.items():
        draw_series(axes, values, method)
    if not series:
        say_empty(axes, "no history of routing")
        return figure
    format_steps(axes, list(series.values()))
    label_ends(axes, [(values.end, METHOD_LABELS[method], COLORS[method]) for method, values in series.items()])
    return figure


def gate_history(runs: Iterable[Run]) -> Figure:
    """Draws the strength S and the gate tanh(S), means over tokens and layers, over steps."""
    figure = new_figure()
    for index, (key, name) in enumerate((("strength", "strength S"), ("gate", "gate tanh S"))):
        margins = (46, 100, 182, 26) if not index else (46, 100, 44, 164)
        axes = add_axes(figure, "training step" if index else "", name, margins=margins)
        series = _history(runs, key)
        if not series:
            say_empty(axes, "not recorded")
            continue
        for method, values in series.items():
            draw_series(axes, values, method)
        top = max(float(np.fmax.reduce(values.values, axis=None)) for values in series.values())
        axes.set_ylim(0, 1.05 if index else 1.1 * top or 1.0)
        axes.yaxis.set_major_locator(MaxNLocator(3))
        format_steps(axes, list(series.values()))
        labels = [(values.end, f"{METHOD_LABELS[m]} {values.end:.3g}", COLORS[m]) for m, values in series.items()]
        label_ends(axes, labels)
    return figure


def load_distribution(runs: Iterable[Run], method: str) -> Figure:
    """Draws how often each atom or expert of one method is selected, sorted, per layer, in multiples of its even share.

    Args:
        runs: Run records of all methods: they set the limits, so that the figures of several methods compare.
        method: Whose layers to draw; every seed gets lines of its own.
    """
    groups = group_runs(runs)
    figure = new_figure(width=340, height=260)
    axes = add_axes(figure, "most to least selected", "times the even share", margins=(52, 62, 44, 26))
    shares = {name: [_shares(run) for run in group] for name, group in groups.items()}
    positive = [share[share > 0] for name in shares for run in shares[name] for share in run]
    if not any(share.size for run in shares.get(method, []) for share in run):
        say_empty(axes, "no routing recorded")
        return figure
    values = np.concatenate(positive)
    low, high = max(values.min(), 1e-3) / 1.5, values.max() * 1.5
    axes.set_yscale("log")
    axes.set_ylim(min(low, 0.5), max(high, 2.0))
    axes.yaxis.set_major_locator(LogLocator(numticks=6))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}{TIMES}"))
    axes.set_xlim(0, 1)
    axes.xaxis.set_major_locator(MaxNLocator(2))
    axes.xaxis.set_major_formatter(PercentFormatter(1.0))
    axes.axhline(1, color=COLORS["faint"], linewidth=1.2, linestyle=(0, (4, 3)), zorder=1)
    _draw_loads(axes, shares[method], method)
    return figure


def _draw_loads(axes: Axes, seeds: Sequence[Sequence[npt.NDArray[np.float64]]], method: str) -> None:
    floor = axes.get_ylim()[0]
    num_layers = max(len(layers) for layers in seeds)
    tails: dict[int, list[float]] = {}
    for layers in seeds:
        for index, share in enumerate(layers):
            if not share.size:
                continue
            position = (np.arange(share.size) + 0.5) / share.size
            drawn = np.maximum(share, floor)
            # Earlier layers are fainter; few points are experts and get a marker each.
            depth = 0.4 + 0.6 * (index + 1) / num_layers
            marker = MARKERS[method] if share.size <= 16 else ""
            axes.plot(position, drawn, color=COLORS[method], alpha=depth, linewidth=1.4, marker=marker, markersize=4)
            tails.setdefault(index, []).append(float(drawn[-1]))
    ends = sorted({min(tails), max(tails)})
    labels = [(float(np.mean(tails[index])), f"layer {index + 1}", COLORS[method]) for index in ends]
    label_ends(axes, [(1.0, "even", COLORS["label"]), *labels])


def _shares(run: Run) -> list[npt.NDArray[np.float64]]:
    """Sorted load of each layer of a run, in multiples of 1 / num_atoms; empty for a layer without finite loads."""
    layers = (run["routing"] or {}).get("layers", [])
    loads = [np.array([number(share) for share in layer["load"]]) * layer["num_atoms"] for layer in layers]
    return [load if np.isfinite(load).all() else load[:0] for load in loads]


def _history(runs: Iterable[Run], key: str) -> dict[str, Series]:
    """Series of one routing quantity, of the methods that have any finite value of it."""

    def points(run: Run) -> Points:
        return ((point["step"], point.get(key)) for point in (run["routing"] or {}).get("history", []))

    series = {method: Series.collect(group, points) for method, group in group_runs(runs).items()}
    return {method: values for method, values in series.items() if np.isfinite(values.values).any()}
