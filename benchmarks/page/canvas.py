"""Several quiet axes in one figure, in the lab's style, and SVG that stands alone."""

import io
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import FontEntry, fontManager
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from torchdsc.lab.figures.style import COLORS, FONT_SIZE, MARKERS, add_axes

# Apart from the lab's four methods under simulated protanopia, deuteranopia and tritanopia (CIE76 distance 20 or more).
PUBLISHED = "#a3338b"
LABEL, FAINT, GRID = COLORS["label"], COLORS["faint"], COLORS["grid"]


class Look(NamedTuple):
    """How a series is drawn."""

    color: str
    marker: str
    label: str
    dashes: str = "-"


LOOKS: Mapping[str, Look] = {
    "dense": Look(COLORS["dense"], MARKERS["dense"], "dense (masked)"),
    "floor": Look(FAINT, "", "floor", (0, (4, 3))),  # type: ignore[arg-type]
    "gather": Look(COLORS["dsc"], MARKERS["dsc"], "gather"),
    "triton": Look(COLORS["mixture_of_loras"], MARKERS["mixture_of_loras"], "triton"),
    "topk alone": Look(COLORS["dense"], MARKERS["dense"], "topk alone"),
    "select": Look(COLORS["dsc"], MARKERS["dsc"], "select"),
    "published": Look(PUBLISHED, "X", "published"),
}


@contextmanager
def own_font() -> Iterator[None]:
    """Texts made meanwhile take the font that comes with matplotlib: a system's of that name may be another."""
    file = Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")
    font = FontEntry(fname=str(file), name="DejaVu Sans of matplotlib")
    if font not in fontManager.ttflist:
        fontManager.ttflist.append(font)
    with matplotlib.rc_context({"font.family": [font.name]}):
        yield


def method_color(name: str) -> str:
    """Colour of a layer or model."""
    if name == "published":
        return PUBLISHED
    return COLORS.get(name, COLORS["moe"] if name.startswith("moe") else FAINT)


def new_figure(width: float, height: float) -> Figure:
    """An empty white figure; a unit is a CSS pixel, where text is 12 high."""
    return Figure(figsize=(width / 72, height / 72), dpi=72, facecolor="white")


def place(figure: Figure, box: tuple[float, float, float, float], xlabel: str, ylabel: str) -> Axes:
    """Axes in a box of left, top, width and height, in figure units from the upper left corner."""
    total_width, total_height = figure.get_size_inches() * 72
    left, top, width, height = box
    margins = (left, total_width - left - width, total_height - top - height, top)
    axes = add_axes(figure, xlabel, "", margins=margins)
    axes.set_title(ylabel, loc="left", color=LABEL, fontsize=FONT_SIZE, pad=8)
    return axes


def log_axis(axes: Axes, which: str, values: Sequence[float], *, at_values: bool = False) -> None:
    """A logarithmic axis with ticks at the values themselves, or at decades and, in a short range, between them."""
    axis = getattr(axes, f"{which}axis")
    getattr(axes, f"set_{which}scale")("log")
    low, high = min(values), max(values)
    room = (high / low) ** 0.06 if high > low else 1.5
    getattr(axes, f"set_{which}lim")(low / room, high * room)
    ticks = sorted(set(values)) if at_values else nice_ticks(low / room, high * room)
    axis.set_major_locator(FixedLocator(ticks))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.6g}"))


def nice_ticks(low: float, high: float) -> list[float]:
    """Round values within limits: decades, or where those are few 1, 2 and 5 of each."""
    decades = [10.0**power for power in range(-9, 10)]
    for steps in ((1,), (1, 3), (1, 2, 5)):
        ticks = [decade * step for decade in decades for step in steps if low <= decade * step <= high]
        if len(ticks) >= 3:
            return ticks
    return ticks


def legend(figure: Figure, names: Sequence[str], looks: Mapping[str, Look] = LOOKS, *, left: float = 8) -> None:
    """A line of what the series are, along the upper edge."""
    total_width, total_height = figure.get_size_inches() * 72
    axes = figure.add_axes((0, 1 - 30 / total_height, 1, 30 / total_height), facecolor="none")
    axes.set_axis_off()
    axes.set_xlim(0, total_width)
    axes.set_ylim(0, 30)
    x = left
    for name in names:
        look = looks[name]
        axes.plot([x, x + 24], [14, 14], color=look.color, linestyle=look.dashes, linewidth=2)
        axes.plot([x + 12], [14], color=look.color, marker=look.marker, markersize=6)
        axes.text(x + 30, 14, look.label, va="center_baseline", color=LABEL, fontsize=FONT_SIZE)
        x += 30 + len(look.label) * FONT_SIZE * 0.58 + 22


def to_svg(figure: Figure, name: str) -> str:
    """A figure as an SVG file, with text as outlines: the same bytes wherever the same matplotlib draws it.

    Args:
        figure: What to render; left alone otherwise.
        name: Distinguishes its ids.
    """
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "path", "svg.hashsalt": name, "savefig.bbox": None}):
        figure.savefig(buffer, format="svg", facecolor="white", metadata={"Date": None})
    # In pixels rather than points, text is as high on a page as it is here.
    return re.sub(r'(width|height)="([\d.]+)pt"', r'\1="\2"', buffer.getvalue())
