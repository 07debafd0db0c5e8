"""What every figure shares: the palette, quiet axes, and SVG for a page."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from torchdsc.baselines.methods import METHODS

PALETTE: dict[str, tuple[str, str]] = {
    **{name: method.color for name, method in METHODS.items()},
    "label": ("#4a5361", "#b3bcc9"),
    "faint": ("#8a93a0", "#788393"),
    "grid": ("#e4e8ee", "#2a313c"),
}
"""Colours (light page, dark page) by CSS name.

The four methods stay apart under simulated protanopia, deuteranopia and tritanopia (CIE76 distance 19 or more) and
have contrast 4.5 or more with the page.
"""

COLORS: dict[str, str] = {name: light for name, (light, _) in PALETTE.items()}
MARKERS: dict[str, str] = {name: method.marker[0] for name, method in METHODS.items()}
FONT_SIZE = 12.0
WIDTH, HEIGHT = 480.0, 310.0


def new_figure(width: float = WIDTH, height: float = HEIGHT) -> Figure:
    """Returns an empty transparent figure of a size in units: one is a CSS pixel at scale 1, where text is 12 high."""
    return Figure(figsize=(width / 72, height / 72), dpi=72, facecolor="none")


def add_axes(
    figure: Figure,
    xlabel: str,
    ylabel: str,
    *,
    margins: tuple[float, float, float, float] = (46, 130, 44, 26),
) -> Axes:
    """Adds quiet axes: horizontal grid lines, no frame, the y label upright above the axis.

    Args:
        figure: Figure made by `new_figure`.
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
    axes.annotate(
        ylabel,
        (0, 1),
        (-left + 4, 10),
        xycoords="axes fraction",
        textcoords="offset points",
        color=COLORS["label"],
        fontsize=FONT_SIZE,
    )
    axes.set_xlabel(xlabel, color=COLORS["label"], fontsize=FONT_SIZE)
    if not xlabel:
        axes.tick_params(axis="x", labelbottom=False)
    return axes


def say_empty(axes: Axes, text: str) -> None:
    """Writes why there is nothing to see into axes without data."""
    axes.set_xticks([])
    axes.set_yticks([])
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", color=COLORS["label"], fontsize=FONT_SIZE)


def pad_limits(values: Sequence[float], fraction: float = 0.08) -> tuple[float, float]:
    """Returns limits around the finite values with room on both sides, also where all are equal."""
    finite = np.asarray(values, dtype=float)
    finite = finite[np.isfinite(finite)]
    low, high = float(finite.min()), float(finite.max())
    room = (high - low) * fraction or abs(high) * 0.05 or 1.0
    return low - room, high + room


def to_svg(figure: Figure, name: str, description: str) -> str:
    """Renders a figure as an SVG element to stand inside an HTML page.

    Text stays text in the page's font. Colours of `PALETTE` become CSS variables (`var(--dsc, #2257e0)`), so that the
    page may recolour them. Ids begin with `name`, so that figures of one page do not share any.

    Args:
        figure: What to render.
        name: Unique within the page; letters, digits and "-".
        description: What the figure shows, for people who do not see it.
    """
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name, "savefig.bbox": None}):
        figure.savefig(buffer, format="svg", facecolor="none", metadata={"Date": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :].strip()
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<!--.*?-->\s*", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = re.sub(r'(url\(|href=")#', rf"\1#{name}-", svg)
    svg = svg.replace("*{stroke", f"#{name} *{{stroke")
    svg = re.sub(r"font: ([\d.]+px)[^;\"]*", r"font-size: \1", svg)  # How older releases write size and family.
    svg = re.sub(r"font-family: [^;\"]*;? ?", "", svg)
    svg = re.sub(r' transform="rotate\(-0 [^)]*\)"', "", svg)
    for css, light in COLORS.items():
        svg = svg.replace(light, f"var(--{css}, {light})")
    head = f'<svg id="{name}" role="img" aria-label="{_attribute(description)}"'
    viewbox = re.search(r'viewBox="[^"]*"', svg)
    namespaces = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    return f"{head} {viewbox.group() if viewbox else ''} {namespaces}>{svg[svg.index('>') + 1 :]}"


def _attribute(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace('"', "&quot;")
