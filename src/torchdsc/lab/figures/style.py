"""What every figure shares: the palette, quiet axes, and SVG for a page."""

import io
import re
from html import escape
from typing import Any

import matplotlib
import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from torchdsc.baselines.methods import METHODS

PALETTE: dict[str, tuple[str, str]] = {
    **{name: method.color for name, method in METHODS.items()},
    "label": ("#4a5361", "#b3bcc9"),
    "faint": ("#8a93a0", "#788393"),
    "grid": ("#e4e8ee", "#2a313c"),
    "page": ("#ffffff", "#14181f"),
}
"""Colours (light page, dark page) by CSS name.

The methods stay apart under simulated protanopia, deuteranopia and tritanopia (CIE76 distance 19 or more) and
have contrast 4.5 or more with the page.
"""

COLORS: dict[str, str] = {name: light for name, (light, _) in PALETTE.items()}
MARKERS: dict[str, str] = {name: method.marker[0] for name, method in METHODS.items()}
FONT_SIZE = 12.0
HEIGHT = 310.0


def new_figure(width: float, height: float) -> Figure:
    """An empty transparent figure of a size in units: one is a CSS pixel at scale 1, where text is 12 high."""
    return Figure(figsize=(width / 72, height / 72), dpi=72, facecolor="none")


def add_axes(figure: Figure, xlabel: str, ylabel: str, *, margins: tuple[float, float, float, float]) -> Axes:
    """Add quiet axes: horizontal grid lines, no frame, the y label upright above the axis.

    Args:
        figure: Figure made by :func:`new_figure`.
        xlabel: What the x axis shows; empty also hides its tick labels.
        ylabel: What the y axis shows.
        margins: Room left, right, below and above the axes, in figure units.
    """
    left, right, bottom, top = margins
    width, height = figure.get_size_inches() * 72
    axes = figure.add_axes(
        (left / width, bottom / height, (width - left - right) / width, (height - top - bottom) / height),
        facecolor="none",
    )
    axes.spines[["top", "left", "right"]].set_visible(False)
    axes.spines["bottom"].set_color(COLORS["faint"])
    axes.grid(axis="y", color=COLORS["grid"], linewidth=1)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=FONT_SIZE, labelcolor=COLORS["label"], color=COLORS["faint"], length=3)
    axes.tick_params(axis="y", length=0)
    axes.tick_params(axis="both", which="minor", left=False, bottom=False, labelleft=False, labelbottom=False)
    font: dict[str, Any] = {"color": COLORS["label"], "fontsize": FONT_SIZE}
    axes.annotate(ylabel, (0, 1), (4 - left, 10), xycoords="axes fraction", textcoords="offset points", **font)
    axes.set_xlabel(xlabel, **font)
    if not xlabel:
        axes.tick_params(axis="x", labelbottom=False)
    return axes


def pad_limits(values: npt.ArrayLike, fraction: float = 0.08) -> tuple[float, float]:
    """Limits around the finite values with room on both sides, also where all are equal."""
    finite = np.asarray(values, dtype=float)
    finite = finite[np.isfinite(finite)]
    low, high = float(finite.min()), float(finite.max())
    room = (high - low) * fraction or abs(high) * 0.05 or 1.0
    return low - room, high + room


def to_svg(figure: Figure, name: str, description: str) -> str:
    """Render a figure as an SVG element to stand inside an HTML page.

    Text stays text in the page's font. Colours of :data:`PALETTE` become CSS variables (``var(--dsc, #2257e0)``), so
    that the page may recolour them. Ids begin with ``name``, so that figures of one page do not share any.

    Args:
        figure: What to render.
        name: Unique within the page; letters, digits and "-".
        description: What the figure shows, for people who do not see it.
    """
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name, "savefig.bbox": None}):
        figure.savefig(buffer, format="svg", facecolor="none", metadata={"Date": None})
    svg = re.sub(r"<metadata>.*?</metadata>\s*|<!--.*?-->\s*", "", buffer.getvalue(), flags=re.DOTALL)
    viewbox = re.findall(r'viewBox="[^"]*"', svg)[0]
    svg = svg[svg.index(">", svg.index("<svg")) + 1 :].strip()
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = re.sub(r'(url\(|href=")#', rf"\1#{name}-", svg)
    svg = svg.replace("*{stroke", f"#{name} *{{stroke")
    svg = re.sub(r"font: ([\d.]+px)[^;\"]*", r"font-size: \1", svg)  # How older releases write size and family.
    svg = re.sub(r"font-family: [^;\"]*;? ?", "", svg)
    svg = re.sub(r' transform="rotate\(-0 [^)]*\)"', "", svg)
    for css, light in COLORS.items():
        svg = svg.replace(light, f"var(--{css}, {light})")
    names = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    return f'<svg id="{name}" role="img" aria-label="{escape(description)}" {viewbox} {names}>{svg}'
