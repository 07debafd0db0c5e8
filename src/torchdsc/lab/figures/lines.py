"""Lines over training (measure, loss, norm of gradients, use of atoms) and over learning rates."""

from collections.abc import Iterable, Mapping
from typing import Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator

from .labels import label_texts, label_variants, labelled_axes
from .looks import Look
from .series import Series
from .style import pad_limits

# The share of the best value by which a line may be worse before it leaves the frame.
_WORSE = 0.25


def draw_curves(
    series: Mapping[str, Series],
    looks: Mapping[str, Look],
    name: str,
    *,
    scale: Literal["linear", "whole", "log", "share"] = "linear",
    lower_is_better: bool = True,
    is_zoomed: bool = False,
) -> Figure | None:
    """Draw a quantity over steps: means over seeds, and bands from the lowest to the highest seed.

    Args:
        series: By variant.
        looks: By variant.
        name: Of the quantity.
        scale: Of its axis; a "share" is shown from 0 to 1, and a "whole" axis has all values, however far apart.
        lower_is_better: Or higher.
        is_zoomed: Show the last half of training alone, with the last means in the labels. Curves that are worse than
            the best by more than a quarter may leave the frame then; an arrow says so.

    Returns:
        None if no variant has two finite points.
    """
    if is_zoomed:
        middle = max((one.places[-1] for one in series.values() if one.num_points > 1), default=0) / 2
        series = {variant: one.since(middle) for variant, one in series.items()}
    found = {variant: one for variant, one in series.items() if one.num_points > 1}
    if not found:
        return None
    # With the value at the end there is less room.
    texts = label_texts((v for v in found if looks[v].is_named), 28 if is_zoomed else 32)
    labels = {v: _label(text, found[v], with_end=is_zoomed) for v, text in texts.items()}
    figure, axes = labelled_axes(labels.values(), "training step", name)
    axes.set_xlim(*pad_limits(np.concatenate([one.places for one in found.values()]), 0.02))
    axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    axes.xaxis.set_major_formatter("{x:,.0f}")
    for variant in sorted(found, key=lambda variant: looks[variant].is_named):
        _draw(axes, found[variant], looks[variant])
    if scale == "log":
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=8))
        axes.yaxis.set_major_formatter("{x:g}")
    elif scale == "share":
        axes.set_ylim(0, 1.03)
    elif scale == "whole":
        axes.set_ylim(*pad_limits(np.concatenate([one.values.ravel() for one in found.values()])))
        axes.yaxis.get_major_formatter().set_useOffset(False)  # type: ignore[attr-defined]
    else:
        axes.set_ylim(*_limits(found.values(), lower_is_better=lower_is_better, with_start=not is_zoomed))
    label_variants(axes, {variant: one.end for variant, one in found.items()}, labels, looks)
    return figure


def draw_rates(
    series: Mapping[str, Series], looks: Mapping[str, Look], name: str, *, lower_is_better: bool
) -> Figure | None:
    """Draw what the best trial of each variant reached at each learning rate; None if no variant has two rates."""
    found = {variant: one for variant, one in series.items() if one.num_points}
    if max((one.num_points for one in found.values()), default=0) < 2:
        return None
    labels = label_texts(variant for variant in found if looks[variant].is_named)
    figure, axes = labelled_axes(labels.values(), "learning rate", name)
    axes.set_xscale("log")
    for variant, one in found.items():
        look = looks[variant]
        axes.plot(one.places, one.mean, **(look.point | look.line), markersize=5, alpha=1 if look.is_named else 0.5)
    axes.set_ylim(*_limits(found.values(), lower_is_better=lower_is_better, with_start=False))
    rates = sorted({float(rate) for one in found.values() for rate in one.places})
    shown = rates[:1]
    for rate in rates[1:]:
        if rate / shown[-1] > (rates[-1] / rates[0]) ** 0.13:
            shown.append(rate)
    axes.set_xticks(shown, [f"{rate:g}" for rate in shown])
    label_variants(axes, {variant: one.end for variant, one in found.items()}, labels, looks)
    return figure


def _draw(axes: Axes, one: Series, look: Look) -> None:
    if not look.is_named:
        axes.plot(one.places, one.mean, **look.line, linewidth=0.8, alpha=0.5, zorder=1)
        return
    if len(one.values) > 1:
        low, high = np.fmin.reduce(one.values, axis=0), np.fmax.reduce(one.values, axis=0)
        axes.fill_between(one.places, low, high, color=look.ink, alpha=0.16, linewidth=0)
    axes.plot(one.places, one.mean, **look.line, linewidth=1.8)
    last = np.flatnonzero(np.isfinite(one.mean))[-1:]
    axes.plot(one.places[last], one.mean[last], **look.point, markersize=5)


def _label(text: str, one: Series, *, with_end: bool) -> str:
    text = f"{text} {one.end:.3f}" if with_end else text
    return text if one.is_complete else f"{text} (NaN)"


def _limits(series: Iterable[Series], *, lower_is_better: bool, with_start: bool) -> tuple[float, float]:
    """Limits that one exploding run cannot stretch."""
    sign = 1.0 if lower_is_better else -1.0
    costs = [sign * one.values for one in series]
    every = np.concatenate([values.ravel() for values in costs])
    every = every[np.isfinite(every)]
    worst = every.min() + _WORSE * abs(every.min())
    if with_start:
        worst = np.fmax.reduce([worst, *(first for values in costs for first in values[:, 0])])
    return pad_limits(sign * every[every <= worst], 0.05)
