"""Labels that stand beside what they name and keep clear of each other."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes

from .style import FONT_SIZE


def spread(positions: Sequence[float], gap: float, low: float = -math.inf, high: float = math.inf) -> list[float]:
    """Moves positions apart to at least `gap`, in order, as little as possible in squared distance.

    Args:
        positions: Where labels would like to be.
        gap: Least distance between neighbours.
        low: Least position allowed; yields to `high` where both cannot be kept.
        high: Largest position allowed.
    """
    order = sorted(range(len(positions)), key=lambda index: positions[index])
    # With i * gap taken off, "at least gap apart" is "not descending": pool adjacent violators.
    blocks: list[tuple[float, int]] = []
    for rank, index in enumerate(order):
        mean, size = positions[index] - rank * gap, 1
        while blocks and blocks[-1][0] > mean:
            before, count = blocks.pop()
            mean, size = (before * count + mean * size) / (count + size), count + size
        blocks.append((mean, size))
    level = [mean for mean, size in blocks for _ in range(size)]
    placed = [min(max(value, low), high - (len(order) - 1) * gap) + rank * gap for rank, value in enumerate(level)]
    result = [0.0] * len(order)
    for rank, index in enumerate(order):
        result[index] = placed[rank]
    return result


def label_ends(axes: Axes, labels: Sequence[tuple[float, str, str]]) -> None:
    """Writes (y, text, colour) labels into the right margin, at their y but never over each other.

    Call it once the y limits are final. A y outside them is pulled to the edge and marked with an arrow.
    """
    low, high = axes.get_ylim()
    bottom, top = axes.transData.transform([(0, low), (0, high)])[:, 1]
    wanted = [float(axes.transData.transform((0, min(max(y, low), high)))[1]) for y, _, _ in labels]
    placed = spread(wanted, FONT_SIZE * 1.25, bottom + 2, top + 6)
    for (y, text, color), position in zip(labels, placed, strict=True):
        arrow = " ↑" if y > high else " ↓" if y < low else ""
        height = (position - bottom) / (top - bottom)
        axes.annotate(
            text + arrow,
            (1, height),
            (8, 0),
            xycoords="axes fraction",
            textcoords="offset points",
            va="center",
            color=color,
            fontsize=FONT_SIZE,
            annotation_clip=False,
        )


@dataclass(frozen=True)
class Box:
    """A rectangle in figure units."""

    left: float
    bottom: float
    right: float
    top: float

    @classmethod
    def beside(cls, x: float, y: float, width: float, height: float, align: str) -> Box:
        """Returns the box of a text whose "left", "center" or "right" is at (x, y), as matplotlib aligns."""
        left = x - width * {"left": 0.0, "center": 0.5, "right": 1.0}[align]
        return cls(left, y - height / 2, left + width, y + height / 2)

    def overlap(self, other: Box) -> float:
        """Returns the area shared with another box."""
        width = min(self.right, other.right) - max(self.left, other.left)
        height = min(self.top, other.top) - max(self.bottom, other.bottom)
        return max(width, 0.0) * max(height, 0.0)


def label_points(
    axes: Axes,
    points: Sequence[tuple[float, float, str, str]],
    segments: Sequence[tuple[tuple[float, float], tuple[float, float]]],
) -> None:
    """Writes (x, y, text, colour) labels beside their points, where each covers least of what is drawn.

    Args:
        axes: Axes with final limits.
        points: Points to label, in data coordinates.
        segments: Lines to keep off, horizontal or vertical, as pairs of ends in data coordinates.
    """
    obstacles = []
    for start, end in itertools.chain(segments, (((x, y), (x, y)) for x, y, _, _ in points)):
        ends = axes.transData.transform([start, end])
        (left, bottom), (right, top) = ends.min(axis=0) - 5, ends.max(axis=0) + 5
        obstacles.append(Box(left, bottom, right, top))
    frame = Box(*axes.transAxes.transform([(0, 0), (1, 1)]).flatten())
    for x, y, text, color in points:
        at_x, at_y = axes.transData.transform((x, y))
        width, height = len(text) * FONT_SIZE * 0.56, FONT_SIZE * 1.1
        places = [
            (dx, dy, align)
            for dx, align in ((10, "left"), (-10, "right"), (0, "center"))
            for dy in (0, 14, -14, 26, -26)
            if dx or dy
        ]
        boxes = [Box.beside(at_x + dx, at_y + dy, width, height, align) for dx, dy, align in places]
        costs = [
            sum(box.overlap(obstacle) for obstacle in obstacles) + 10 * (width * height - box.overlap(frame)) + abs(dy)
            for box, (_, dy, _) in zip(boxes, places, strict=True)
        ]
        best = costs.index(min(costs))
        obstacles.append(boxes[best])
        axes.annotate(
            text,
            (x, y),
            places[best][:2],
            textcoords="offset points",
            ha=places[best][2],
            va="center_baseline",
            color=color,
            fontsize=FONT_SIZE,
        )
