"""Pictures of a study."""

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from torchdsc.lab.figures.labels import label_ends
from torchdsc.lab.figures.style import COLORS, FONT_SIZE, HEIGHT, MARKERS, WIDTH, add_axes, new_figure, pad_limits
from torchdsc.lab.tables import MINUS

from .summary import VariantRow

__all__ = ["draw_differences", "draw_losses", "draw_rates"]

# Of one line of differences, and of one letter of their names, in figure units.
_LINE, _LETTER = 26.0, 6.8


def draw_losses(results: Mapping[str, Any], rows: Sequence[VariantRow]) -> Figure:
    """Final validation losses, a mark for each variant and seed."""
    drawing, axes = _beside_names([row.name for row in rows], "", "validation loss")
    for place, row in enumerate(rows):
        method = _method(results, row.name)
        axes.plot([place] * len(row.valid), row.valid, MARKERS[method], color=COLORS[method], markersize=5)
    axes.set_ylim(*pad_limits([value for row in rows for value in row.valid]))
    axes.set_xlim(-0.5, len(rows) - 0.5)
    ends = [(fmean(row.valid), row.name, COLORS[_method(results, row.name)]) for row in rows]
    label_ends(axes, ends)
    return drawing


def draw_rates(results: Mapping[str, Any]) -> Figure:
    """Losses of trials by learning rate, a line a variant."""
    names = [variant["name"] for variant in results["config"]["variants"]]
    drawing, axes = _beside_names(names, "learning rate", "validation loss of trials")
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


def draw_differences(results: Mapping[str, Any], rows: Sequence[VariantRow]) -> Figure:
    """Differences to the variants that each is compared to, with 95 % intervals, a line each."""
    found = [(row.name, comparison) for row in rows for comparison in row.comparisons]
    names = [f"{name} {MINUS} {comparison.other}" for name, comparison in found]
    left = _LETTER * max(map(len, names)) + 16
    drawing = new_figure(left + WIDTH / 2, _LINE * len(found) + 70)
    axes = add_axes(drawing, "nats per token", "", margins=(left, 20, 44, 26))
    shown = [0.0]
    for line, (name, comparison) in enumerate(found):
        mean, half = comparison.difference.mean, comparison.difference.half_width or 0.0
        method = _method(results, name)
        axes.plot([mean - half, mean + half], [line, line], color=COLORS[method], linewidth=1.5)
        axes.plot([mean], [line], MARKERS[method], color=COLORS[method], markersize=5)
        shown += [mean - half, mean + half]
    axes.axvline(0, color=COLORS["faint"], linewidth=1)
    axes.set_xlim(*pad_limits(shown))
    axes.set_ylim(len(found) - 0.5, -0.5)
    axes.set_yticks(range(len(found)), names, fontsize=FONT_SIZE)
    return drawing


def _beside_names(names: Sequence[str], xlabel: str, ylabel: str) -> tuple[Figure, Axes]:
    """An empty figure with room for names at the right, and its axes."""
    right = _LETTER * max(map(len, names)) + 20
    drawing = new_figure(WIDTH * 3 / 4 + right, max(HEIGHT, 1.4 * FONT_SIZE * len(names) + 70))
    return drawing, add_axes(drawing, xlabel, ylabel, margins=(46, right, 44, 26))


def _method(results: Mapping[str, Any], name: str) -> str:
    method: str = next(v["method"] for v in results["config"]["variants"] if v["name"] == name)
    return method
