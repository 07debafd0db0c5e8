"""Differences between variants, with their intervals."""

import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
from matplotlib.figure import Figure

from torchdsc.lab.experiment.intervals import MINUS
from torchdsc.lab.experiment.summary import Row
from torchdsc.lab.tasks.task import Measure

from .labels import label_text
from .looks import Look
from .style import COLORS, FONT_SIZE, add_axes, new_figure, pad_limits

# Letters of a line of a name, and in figure units: of a letter, of a line of text, of the space between names, and of
# the axes.
_LETTERS, _LETTER, _LINE, _SPACE, _WIDTH = 30, 6.4, 14.0, 10.0, 280.0


def draw_differences(rows: Sequence[Row], looks: Mapping[str, Look], measure: Measure) -> Figure | None:
    """Draw the differences to the variants that each is compared to, with 95 % intervals, a line each.

    Returns:
        None if no difference is finite.
    """
    found = [(row.name, c) for row in rows for c in row.comparisons if math.isfinite(c.difference.mean)]
    if not found:
        return None
    others = {comparison.other for _, comparison in found}
    names = [_lines(name, "" if len(others) == 1 else f"{MINUS} {c.other}") for name, c in found]
    heights = np.array([_LINE * len(lines) + _SPACE for lines in names])
    places = heights.cumsum() - heights / 2
    left = _LETTER * max(len(line) for lines in names for line in lines) + 16
    to = f" to {label_text(others.pop())}" if len(others) == 1 else ""
    figure = new_figure(left + _WIDTH + 20, heights.sum() + 56)
    axes = add_axes(figure, f"difference{to} ({measure.unit})", "", margins=(left, 20, 44, 12))
    axes.grid(visible=False)
    shown = [0.0]
    for (name, comparison), place in zip(found, places, strict=True):
        look, mean = replace(looks[name], is_named=True), comparison.difference.mean
        half = comparison.difference.half_width or 0.0
        axes.plot([mean - half, mean + half], [place, place], color=look.ink, linewidth=1.5)
        axes.plot([mean], [place], **look.point, markersize=6)
        shown += [mean - half, mean + half]
    axes.axvline(0, color=COLORS["faint"], linewidth=1)
    axes.set_xlim(*pad_limits(shown))
    axes.set_ylim(heights.sum(), 0)
    axes.set_yticks(places, ["\n".join(lines) for lines in names], fontsize=FONT_SIZE)
    return figure


def _lines(name: str, other: str) -> list[str]:
    if len(name) + len(other) < _LETTERS:
        return [label_text(f"{name} {other}".rstrip())]
    return [line for text in (name, other) for line in textwrap.wrap(label_text(text, 2 * _LETTERS), _LETTERS)]
