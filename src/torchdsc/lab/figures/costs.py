"""What a measure costs, in parameters or in time."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from .labels import label_texts, label_variants, labelled_axes
from .looks import Look
from .style import pad_limits

# Costs that are further apart than by this factor stand on a logarithmic axis.
_WIDE = 8.0
# Between marks, in figure units.
_GAP = 9.0


@dataclass(frozen=True)
class Cost:
    """What a variant costs, and what it reaches.

    Attributes:
        at: The cost.
        ends: Of the interval of the cost, or another figure of it and the cost itself.
        measure: What it reaches.
        deviation: Of that over seeds; zero where it is unknown.
        path: Further costs, and what is reached at each, from the mark on.
    """

    at: float
    ends: tuple[float, float]
    measure: float
    deviation: float
    path: tuple[tuple[float, float], ...] = ()

    @property
    def range(self) -> tuple[float, float]:
        """What it reaches less the deviation, and with it."""
        return self.measure - self.deviation, self.measure + self.deviation


def draw_costs(
    costs: Mapping[str, Cost],
    looks: Mapping[str, Look],
    labelled: Sequence[str],
    xlabel: str,
    ylabel: str,
    *,
    side_by_side: bool = True,
) -> Figure | None:
    """Draw a mark for each variant, the deviation of its measure over seeds, the ends of its cost, and its path.

    Args:
        costs: By variant.
        looks: By variant.
        labelled: Variants whose names stand at the right, at the height of their marks.
        xlabel: What the cost is.
        ylabel: What the measure is.
        side_by_side: Move marks apart that stand at one place.

    Returns:
        None for less than two variants.
    """
    if len(costs) < 2:
        return None
    labels = label_texts(variant for variant in labelled if variant in costs)
    figure, axes = labelled_axes(labels.values(), xlabel, ylabel)
    _fit(axes, list(costs.values()))
    named = {variant: cost for variant, cost in costs.items() if looks[variant].is_named}
    own = [cost.at for cost in named.values()]
    places = dict(zip(named, _side_by_side(axes, list(named.values())) if side_by_side else own, strict=True))
    for variant, cost in costs.items():
        if variant not in named:
            axes.plot([cost.at], [cost.measure], **looks[variant].point, markersize=4, zorder=1)
            continue
        look, x, y = looks[variant], places[variant], cost.measure
        axes.plot([x], [y], **look.point, markersize=7, zorder=4)
        whisker: dict[str, Any] = {"color": look.ink, "linewidth": 1.2, "alpha": 0.7, "zorder": 2}
        axes.plot([x, x], cost.range, **whisker)
        if cost.path:
            axes.plot(*zip((x, y), *cost.path, strict=True), marker=".", markersize=4, linestyle=":", **whisker)
        for end in cost.ends:
            if end != cost.at:
                axes.plot([end, x], [y, y], marker="|", markevery=[0], **whisker)
    label_variants(axes, {variant: cost.measure for variant, cost in costs.items()}, labels, looks)
    return figure


def _fit(axes: Axes, costs: Sequence[Cost]) -> None:
    places = np.array([value for cost in costs for value in (cost.at, *cost.ends, *(at for at, _ in cost.path))])
    least = places[places > 0].min(initial=np.inf)
    # What may be negative, such as a difference, is no matter of factors.
    if places.min() >= 0 and places.max() > _WIDE * least:
        # A cost of zero has a place too, left of a linear part up to the least other one.
        has_zero = places.min() <= 0
        axes.set_xscale("symlog", linthresh=least, linscale=0.5)
        axes.set_xlim(-0.3 * least if has_zero else least / 1.5, places.max() * 2)
        powers = 10.0 ** np.arange(np.ceil(np.log10(least)), np.ceil(np.log10(places.max())) + 1)
        axes.set_xticks([*([0.0] if has_zero else []), *powers[:: len(powers) // 6 + 1]])
    else:
        axes.set_xlim(*pad_limits(places, 0.12))
        axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.xaxis.set_major_formatter("{x:g}")
    heights = [value for cost in costs for value in (*cost.range, *(measure for _, measure in cost.path))]
    axes.set_ylim(*pad_limits(heights, 0.15))


def _side_by_side(axes: Axes, costs: Sequence[Cost]) -> list[float]:
    """Places of marks, moved as little as keeps their upright lines apart."""
    placed: list[tuple[float, float, float]] = []
    for cost in costs:
        (x, low), (_, high) = axes.transData.transform([(cost.at, end) for end in cost.range])
        low, high = low - _GAP / 2, high + _GAP / 2
        rivals = [other for other, bottom, top in placed if bottom < high and low < top]
        places = [x + step * _GAP for step in sorted(range(-len(rivals), len(rivals) + 1), key=abs)]
        free = (place for place in places if all(abs(place - rival) > 0.99 * _GAP for rival in rivals))
        placed.append((next(free, x), low, high))
    return [float(axes.transData.inverted().transform((x, 0.0))[0]) for x, _, _ in placed]
