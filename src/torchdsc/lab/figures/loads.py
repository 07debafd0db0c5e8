"""How evenly a routing uses its atoms or experts."""

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, PercentFormatter

from torchdsc.diagnostics.routing import LOAD_EDGES
from torchdsc.lab.experiment.intervals import TIMES
from torchdsc.lab.tasks.task import Record

from .labels import label_ends
from .looks import Look
from .series import number
from .style import COLORS, add_axes, new_figure

Load = npt.NDArray[np.float64]


def draw_loads(runs: Mapping[str, Sequence[Record]], looks: Mapping[str, Look], variant: str) -> Figure | None:
    """Draw how often each atom or expert is selected, sorted, per layer, in multiples of its even share.

    Args:
        runs: Records by variant: all set the limits, so that the figures of several variants compare.
        looks: By variant.
        variant: Whose layers to draw; every run gets lines of its own.

    Returns:
        None if no load of it was recorded.
    """
    loads = {name: [_loads(run) for run in records] for name, records in runs.items()}
    if not any(loads[variant]):
        return None
    every = np.concatenate([load for layers in loads.values() for run in layers for load in run.values()])
    every = every[every > 0]
    figure = new_figure(width=340, height=260)
    axes = add_axes(figure, "most to least selected", "times the even share", margins=(52, 62, 44, 26))
    axes.set_yscale("log")
    floor = min(max(every.min(), 1e-3) / 1.5, 0.5)
    axes.set_ylim(floor, max(every.max() * 1.5, 2.0))
    axes.yaxis.set_major_locator(LogLocator(numticks=6))
    axes.yaxis.set_major_formatter(f"{{x:g}}{TIMES}")
    axes.set_xlim(0, 1)
    axes.xaxis.set_major_locator(MaxNLocator(2))
    axes.xaxis.set_major_formatter(PercentFormatter(1.0))
    axes.axhline(1, color=COLORS["faint"], linewidth=1.2, linestyle=(0, (4, 3)), zorder=1)
    look, tails = looks[variant], dict[int, list[float]]()
    for run in loads[variant]:
        for layer, load in run.items():
            drawn, places = np.maximum(load, floor), (np.arange(load.size) + 0.5) / load.size
            # Earlier layers are fainter; few points are experts and get a marker each.
            depth, marker = 0.4 + 0.6 * layer / max(run), look.marker if load.size <= 16 else ""
            axes.plot(places, drawn, color=look.ink, marker=marker, markersize=4, linewidth=1.4, alpha=depth)
            tails.setdefault(layer, []).append(float(drawn[-1]))
    ends = [(float(np.mean(tails[layer])), f"layer {layer}", look.ink) for layer in sorted({min(tails), max(tails)})]
    label_ends(axes, [(1.0, "even", COLORS["label"]), *ends])
    return figure


def draw_load_history(runs: Sequence[Record], look: Look) -> Figure | None:
    """Draw, over training, which share of the atoms or experts has no load, a small one, and so on to a large one.

    Args:
        runs: Records of a variant, over which it draws the mean at the steps that all of them have.
        look: Of the variant.

    Returns:
        None if there are not two such steps.
    """
    points = [(run["routing"] or {}).get("history", []) for run in runs]
    histories = [{point["step"]: point["histogram"] for point in own if "histogram" in point} for own in points]
    steps = sorted(set(histories[0]).intersection(*histories)) if histories else []
    if len(steps) < 2:
        return None
    shares = np.array([[history[step] for step in steps] for history in histories]).mean(axis=0).T
    figure = new_figure(width=340, height=260)
    axes = add_axes(figure, "training step", "share of atoms or experts", margins=(52, 86, 44, 26))
    axes.set_xlim(steps[0], steps[-1])
    axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    axes.set_ylim(0, 1)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    tops = np.cumsum(shares, axis=0)
    names = ["unused", *(f"to {edge:g}{TIMES}" for edge in LOAD_EDGES), "more"]
    labels = []
    for place, (name, share, top) in enumerate(zip(names, shares, tops, strict=True)):
        # The larger the load, the stronger.
        ink, alpha = (COLORS["faint"], 0.3) if place == 0 else (look.ink, 0.1 + 0.9 * (place - 1) / (len(names) - 2))
        axes.fill_between(steps, top - share, top, color=ink, alpha=alpha, linewidth=0)
        labels += [(float(top[-1] - share[-1] / 2), name, COLORS["label"])] if share[-1] >= 0.005 else []
    label_ends(axes, labels)
    return figure


def _loads(run: Record) -> dict[int, Load]:
    """Sorted load of each layer with finite loads, counted from 1, in multiples of its even share."""
    layers = enumerate((run["routing"] or {}).get("layers", []), 1)
    loads = {index: np.array([number(s) for s in layer["load"]]) * layer["num_atoms"] for index, layer in layers}
    return {index: load for index, load in loads.items() if load.size and np.isfinite(load).all()}
