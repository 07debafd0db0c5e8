"""Labels that stand beside what they name and keep clear of each other."""

import math
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.transforms import IdentityTransform
from scipy.optimize import isotonic_regression

from .looks import Look
from .style import FONT_SIZE, HEIGHT, add_axes, new_figure

# Of a letter, about, of the line and marker before a label, and of axes: in figure units.
_LETTER, _SWATCH, _WIDTH = 7.0, 26.0, 330.0
_LONGEST = 32


def label_text(name: str, longest: int = _LONGEST) -> str:
    """A name as matplotlib takes it, without its middle where it is too long."""
    if len(name) > longest:
        half = (longest - 1) // 2
        name = f"{name[: longest - 1 - half].rstrip()}\N{HORIZONTAL ELLIPSIS}{name[-half:].lstrip()}"
    # Two dollars would make a formula of what is between.
    return name.replace("$", r"\$")


def label_texts(names: Iterable[str], longest: int = _LONGEST) -> dict[str, str]:
    """The :func:`label_text` of each name, longer where two would read alike."""
    names = list(names)
    texts = {name: label_text(name, longest) for name in names}
    for longer in range(longest + 1, max(map(len, names), default=0) + 1):
        count = Counter(texts.values())
        texts = {name: text if count[text] == 1 else label_text(name, longer) for name, text in texts.items()}
    return texts


def labelled_axes(labels: Collection[str], xlabel: str, ylabel: str) -> tuple[Figure, Axes]:
    """A new figure and its axes, with room at the right for labels with looks; see :func:`label_ends`."""
    right = _SWATCH + _LETTER * max(map(len, labels), default=0) + 14
    figure = new_figure(46 + _WIDTH + right, max(HEIGHT, 1.25 * FONT_SIZE * len(labels) + 70))
    return figure, add_axes(figure, xlabel, ylabel, margins=(46, right, 44, 26))


def spread(positions: Sequence[float], gap: float, low: float = -math.inf, high: float = math.inf) -> list[float]:
    """Move positions apart to at least ``gap``, in order, as little as possible in squared distance.

    Args:
        positions: Where labels would like to be.
        gap: Least distance between neighbours.
        low: Least position allowed; yields to ``high`` where both cannot be kept.
        high: Largest position allowed.
    """
    if not positions:
        return []
    order = np.argsort(positions, kind="stable")
    # With these taken off, "at least gap apart" is "not descending".
    gaps = gap * np.arange(len(order))
    level = isotonic_regression(np.asarray(positions)[order] - gaps).x
    placed = np.empty(len(order))
    placed[order] = np.minimum(np.maximum(level, low), high - gaps[-1]) + gaps
    return placed.tolist()


def label_variants(axes: Axes, ends: Mapping[str, float], labels: Mapping[str, str], looks: Mapping[str, Look]) -> None:
    """Write the labels of variants at their ends, in their colours and with their looks; see :func:`label_ends`."""
    found = [(ends[variant], text, looks[variant].ink) for variant, text in labels.items()]
    label_ends(axes, found, [looks[variant] for variant in labels])


def label_ends(axes: Axes, labels: Sequence[tuple[float, str, str]], looks: Sequence[Look] = ()) -> None:
    """Write (y, text, colour) labels into the right margin, at their y but never over each other.

    Call it once the y limits are final. A y outside them is pulled to the edge and marked with an arrow.

    Args:
        axes: To write beside.
        labels: What to write.
        looks: Of each label, shown before it.
    """
    low, high = axes.get_ylim()
    edge, bottom, top = axes.bbox.x1 + 8, axes.bbox.y0, axes.bbox.y1
    wanted = [float(axes.transData.transform((0, min(max(y, low), high)))[1]) for y, _, _ in labels]
    placed = spread(wanted, FONT_SIZE * 1.25, bottom + 2, top + 6)
    in_units: dict[str, Any] = {"transform": IdentityTransform(), "clip_on": False}
    for look, height in zip(looks, placed, strict=False):
        axes.plot([edge, edge + 20], [height, height], **look.line, **in_units, linewidth=2)
        axes.plot([edge + 10], [height], **look.point, **in_units, markersize=5)
    left = edge + (_SWATCH if looks else 0)
    for (y, text, color), height in zip(labels, placed, strict=True):
        arrow = " ↑" if y > high else " ↓" if y < low else ""
        axes.text(left, height, text + arrow, **in_units, va="center", color=color, fontsize=FONT_SIZE)
