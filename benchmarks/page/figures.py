"""The figures of the page."""

from collections.abc import Callable, Mapping, Sequence
from itertools import cycle
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from benchmarks.case import Row, ordered
from benchmarks.suite.compose import BASE
from torchdsc.lab.figures.labels import label_ends
from torchdsc.lab.figures.style import COLORS, FONT_SIZE, MARKERS

from .canvas import FAINT, GRID, LABEL, LOOKS, PUBLISHED, legend, log_axis, method_color, new_figure, place, to_svg
from .markdown import number

_NEVER = 2.0


def pass_name(kind: str) -> str:
    """A kind of call in a word."""
    return {"forward": "forward", "forward+backward": "training"}[kind]


def model_title(row: Row) -> str:
    """A point of the whole models in words."""
    point = row["point"]
    if point["kind"] == "generate":
        return f"generate {point['new']} after {point['tokens']}, per token"
    return f"prefill {point['batch']} x {point['tokens']}"


def compose(rows: Sequence[Row], name: str) -> str:
    """Milliseconds of each implementation against each size, the others as in ``BASE``."""
    figure = new_figure(760, 560)
    names = _drawn(rows)
    legend(figure, names)
    labels = {"tokens": "tokens", "M": "atoms M", "K": "selected atoms K", "d": "features d"}
    for index, (size, xlabel) in enumerate(labels.items()):
        others = {key: value for key, value in BASE.items() if key != size}
        chosen = [row for row in rows if others.items() <= row["point"].items()]
        box = (52 + 378 * (index % 2), 66 + 258 * (index // 2), 310, 176)
        fixed = ", ".join(f"{key} {value}" for key, value in others.items())
        _lines(place(figure, box, xlabel, f"ms; {fixed}"), chosen, size, names, rows)
    return to_svg(figure, name)


def select(rows: Sequence[Row], name: str) -> str:
    """Milliseconds against tokens at the largest M and the smallest K, forward and in training."""
    figure = new_figure(760, 300)
    names = _drawn(rows)
    legend(figure, names)
    atoms, top_k = (pick((row["point"][size] for row in rows), default=0) for size, pick in (("M", max), ("K", min)))
    for index, kind in enumerate(("forward", "forward+backward")):
        chosen = [r for r in rows if (r["point"]["kind"], r["point"]["M"], r["point"]["K"]) == (kind, atoms, top_k)]
        axes = place(figure, (52 + 378 * index, 66, 310, 176), "tokens", f"ms, {pass_name(kind)}; M {atoms}, K {top_k}")
        _lines(axes, chosen, "tokens", names, rows)
    return to_svg(figure, name)


def atoms(rows: Sequence[Row], name: str) -> str:
    """Milliseconds against the number of atoms, forward and in training."""
    figure = new_figure(760, 270)
    for index, row in enumerate(rows):
        axes = place(figure, (52 + 378 * index, 36, 310, 176), "atoms M", f"ms, {pass_name(row['point']['kind'])}")
        counts = [int(call) for call in row["calls"]]
        spreads = [row["calls"][str(count)]["ms"] for count in counts]
        axes.fill_between(counts, [s["q1"] for s in spreads], [s["q3"] for s in spreads], color=GRID, lw=0)
        axes.plot(counts, [s["median"] for s in spreads], color=method_color("dsc"), marker="o", ms=4)
        axes.set_xscale("log", base=2)
        axes.set_ylim(bottom=0)
    return to_svg(figure, name)


def _drawn(rows: Sequence[Row]) -> list[str]:
    names = {name for row in rows for name in row["calls"]} | {"floor" for row in rows if "floor" in row}
    return [name for name in ordered(sorted(names)) if name in LOOKS]


def _lines(axes: Axes, rows: Sequence[Row], size: str, names: Sequence[str], scale: Sequence[Row]) -> None:
    if not rows:
        axes.set_axis_off()
        return
    rows = sorted(rows, key=lambda row: row["point"][size])
    shown = []
    for name in names:
        look = LOOKS[name]
        values = [(row["point"][size], _value(row, name)) for row in rows]
        points = [(at, value) for at, value in values if value is not None]
        if not points:
            continue
        axes.plot(*zip(*points, strict=True), color=look.color, linestyle=look.dashes, linewidth=2)
        axes.plot(*zip(*points, strict=True), color=look.color, linestyle="", marker=look.marker, markersize=6)
        shown += [value for _, value in points]
    log_axis(axes, "x", [row["point"][size] for row in rows], at_values=True)
    log_axis(axes, "y", shown)


def _value(row: Row, name: str) -> float | None:
    if name in row["calls"]:
        value: float = row["calls"][name]["ms"]["median"]
        return value
    return row["floor"]["ms"] / row["floor"]["per"] if name == "floor" and "floor" in row else None


def ratios(rows: Sequence[Row], label: Callable[[str], str], name: str) -> str:
    """The subject's time over each other call's: a panel for each number of tokens, a dot for each pass."""
    tokens = list(dict.fromkeys(row["point"]["tokens"] for row in rows))
    names = [n for n in ordered({n: 0 for row in rows for n in row["calls"]}) if n not in {r["subject"] for r in rows}]
    height = 26 * len(names)
    figure = new_figure(760, height + 110)
    width = (760 - 150 - 22 * len(tokens)) / max(1, len(tokens))
    spreads = [row["calls"][n]["subject_over_it"] for row in rows for n in names if n in row["calls"]]
    ends = [spread[end] for spread in spreads for end in ("q1", "q3")]
    for index, count in enumerate(tokens):
        title = f"{count:,} token{'s' if count != 1 else ''}"
        axes = place(figure, (150 + (width + 22) * index, 52, width, height), "DSC's time over it", title)
        _categories(axes, [label(n) for n in names] if index == 0 else [""] * len(names))
        for row in (row for row in rows if row["point"]["tokens"] == count):
            training = row["point"]["kind"] != "forward"
            for place_, n in enumerate(names):
                if n in row["calls"]:
                    _dot(axes, row["calls"][n]["subject_over_it"], place_ + (0.18 if training else -0.18), n, training)
        log_axis(axes, "x", [*ends, 0.5, 2])
        axes.axvline(1, color=LABEL, linewidth=1, zorder=1)
    _note(figure, "filled: forward; hollow: training. Left of the line DSC is the quicker; bars are quartiles.")
    return to_svg(figure, name)


def _dot(axes: Axes, spread: Mapping[str, float], y: float, name: str, hollow: bool) -> None:
    color = method_color(name)
    axes.plot([spread["q1"], spread["q3"]], [y, y], color=color, linewidth=1.4, zorder=2)
    fill = "white" if hollow else color
    marker = MARKERS.get(name.split(" ")[0], "X" if name == "published" else "o")
    axes.plot([spread["median"]], [y], color=color, marker=marker, markersize=7, markerfacecolor=fill, zorder=3)


def models(rows: Sequence[Row], label: Callable[[str], str], name: str) -> str:
    """Milliseconds of each model at each point, as bars."""
    names = ordered({"floor": 0, **{n: 0 for row in rows for n in row["calls"]}})
    height = 26 * len(names)
    figure = new_figure(760, height + 84)
    width = (760 - 130 - 40 * len(rows)) / max(1, len(rows))
    for index, row in enumerate(rows):
        axes = place(figure, (130 + (width + 40) * index, 36, width, height), "ms", model_title(row))
        _categories(axes, [label(n) for n in names] if index == 0 else [""] * len(names))
        values = {n: value for n in names if (value := _value(row, n)) is not None}
        for place_, n in enumerate(names):
            if n in values:
                axes.barh(place_, values[n], height=0.6, color=method_color(n), alpha=0.45 if n == "floor" else 1)
                _beside(axes, values[n], place_, number(values[n]))
            else:
                _beside(axes, 0, place_, "left out")
        # Room for the figure beside the longest bar.
        axes.set_xlim(0, max(values.values()) * 1.3)
        axes.xaxis.set_major_locator(MaxNLocator(3))
    return to_svg(figure, name)


def memory(rows: Sequence[Row], name: str) -> str:
    """GiB of a training step at each point, as bars; hatched where computed."""
    bars: list[list[tuple[str, float, str, bool]]] = []
    for row in rows:
        own = [("DSC", row["calls"]["dsc"]["bytes"], COLORS["dsc"], False)]
        if "published" in row["calls"]:
            own.append(("published, measured", row["calls"]["published"]["bytes"], PUBLISHED, False))
        bars.append([*own, ("published, computed", row["computed"]["published"]["bytes"], PUBLISHED, True)])
    figure = new_figure(760, sum(26 * len(group) + 88 for group in bars) or 60)
    top = 30.0
    for row, group in zip(rows, bars, strict=True):
        title = ", ".join(f"{key} {value:,}" for key, value in row["point"].items())
        axes = place(figure, (150, top, 540, 26 * len(group)), "GiB", title)
        _categories(axes, [text for text, *_ in group])
        for index, (_, size, color, hatched) in enumerate(group):
            style: dict[str, Any] = {"facecolor": "white", "hatch": "////"} if hatched else {"facecolor": color}
            axes.barh(index, size / 2**30, height=0.6, edgecolor=color, **style)
            _beside(axes, size / 2**30, index, number(size / 2**30))
        axes.set_xlim(0, max(size for _, size, *_ in group) / 2**30 * 1.12)
        axes.xaxis.set_major_locator(MaxNLocator(5))
        top += 26 * len(group) + 88
    return to_svg(figure, name)


def crossovers(points: Sequence[Mapping[str, Any]], name: str) -> str:
    """K / M where both cost the same, against tokens, a line for each M and d."""
    figure = new_figure(560, 320)
    axes = place(figure, (52, 36, 340, 226), "tokens", "K / M from which the masked product is the quicker")
    lines = list(dict.fromkeys((point["atoms"], point["width"]) for point in points))
    looks = list(zip((COLORS["dsc"], COLORS["moe"], COLORS["mixture_of_loras"], COLORS["dense"]), "Ds^o", strict=True))
    tokens = [point["tokens"] for point in points]
    ratios_ = [min(point["ratio"], _NEVER) for point in points]
    log_axis(axes, "x", tokens, at_values=True)
    log_axis(axes, "y", [*ratios_, 0.01, _NEVER])
    axes.set_yticks([0.01, 0.03, 0.1, 0.3, 1, _NEVER], ["0.01", "0.03", "0.1", "0.3", "1", "never"])
    ends = []
    for (atoms, width), (color, marker) in zip(lines, cycle(looks), strict=False):
        own = sorted((p["tokens"], p["ratio"]) for p in points if (p["atoms"], p["width"]) == (atoms, width))
        axes.plot(*zip(*own, strict=True), color=color, marker=marker, markersize=6, linewidth=2)
        ends.append((own[-1][1], f"M {atoms}, d {width}", color))
    label_ends(axes, ends)
    return to_svg(figure, name)


def _categories(axes: Axes, labels: Sequence[str]) -> None:
    """Names down the y axis, from the top; grid lines along x."""
    axes.set_ylim(len(labels) - 0.5, -0.5)
    axes.set_yticks(range(len(labels)), labels)
    axes.grid(visible=False, axis="y")
    axes.grid(axis="x", color=GRID, linewidth=1)


def _beside(axes: Axes, x: float, y: float, text: str) -> None:
    options: dict[str, Any] = {"textcoords": "offset points", "va": "center_baseline", "fontsize": FONT_SIZE}
    axes.annotate(text, (x, y), (5, 0), color=FAINT if text == "left out" else LABEL, **options)


def _note(figure: Figure, text: str) -> None:
    _, height = figure.get_size_inches() * 72
    figure.text(8 / 760, 1 - 18 / height, text, color=LABEL, fontsize=FONT_SIZE)
