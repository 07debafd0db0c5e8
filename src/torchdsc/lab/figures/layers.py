"""Sorted curves of every layer of a model, in one figure."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, PercentFormatter

from .labels import label_ends
from .style import COLORS, add_axes, new_figure, pad_limits

# Smaller values are drawn as this share of the largest.
_FLOOR = 1e-4


def draw_layers(
    curves: Mapping[str, Sequence[float]], xlabel: str, ylabel: str, *, even: float | None = None, is_log: bool = True
) -> Figure | None:
    """Draw a curve for each layer, from its largest value to its smallest; earlier layers are fainter.

    Args:
        curves: Values by layer, sorted, in the model's order.
        xlabel: What is sorted.
        ylabel: The quantity.
        even: A value to mark by a line.
        is_log: Whether its axis is logarithmic.

    Returns:
        None if no curve has a finite value.
    """
    found = {name: np.array(values) for name, values in curves.items() if len(values) and np.isfinite(values).all()}
    if not found:
        return None
    figure = new_figure(width=380, height=280)
    axes = add_axes(figure, xlabel, ylabel, margins=(52, 72, 44, 26))
    every = np.concatenate([*found.values(), [even] if even else []])
    if is_log and every.max() > 0:
        floor = max(every[every > 0].min(), every.max() * _FLOOR)
        axes.set_yscale("log")
        axes.set_ylim(floor / 1.3, every.max() * 1.3)
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=8))
        axes.yaxis.set_major_formatter("{x:g}")
        found = {name: np.maximum(values, floor) for name, values in found.items()}
    else:
        axes.set_ylim(*pad_limits(every))
    axes.set_xlim(0, 1)
    axes.xaxis.set_major_locator(MaxNLocator(2))
    axes.xaxis.set_major_formatter(PercentFormatter(1.0))
    if even:
        axes.axhline(even, color=COLORS["faint"], linewidth=1.2, linestyle=(0, (4, 3)), zorder=1)
    last = max(1, len(found) - 1)
    for place, values in enumerate(found.values()):
        places = (np.arange(values.size) + 0.5) / values.size
        axes.plot(places, values, color=COLORS["dsc"], linewidth=1.4, alpha=0.35 + 0.65 * place / last)
    numbered = dict(enumerate(found.values(), 1))
    ends = [(float(numbered[n][-1]), f"layer {n}", COLORS["dsc"]) for n in dict.fromkeys((1, len(numbered)))]
    label_ends(axes, ends)
    return figure
