"""Figures: what they draw, where labels go, and that they stand on a page by themselves."""

from __future__ import annotations

import math
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest

from torchdsc.baselines.methods import METHODS
from torchdsc.lab import figures
from torchdsc.lab.figures.labels import Box, spread
from torchdsc.lab.figures.series import Series
from torchdsc.lab.figures.style import COLORS, PALETTE, add_axes, new_figure, pad_limits

SVG = "{http://www.w3.org/2000/svg}"
ALL = [
    figures.loss_curves,
    lambda runs: figures.loss_curves(runs, zoom=True),
    figures.loss_against_parameters,
    figures.loss_against_latency,
    figures.utilization_history,
    figures.gate_history,
    lambda runs: figures.load_distribution(runs, "dsc"),
]


def texts(figure):
    return [text.get_text() for axes in figure.axes for text in axes.texts]


def series(runs):
    return Series.collect(runs, lambda run: ((point["step"], point["val_loss"]) for point in run["curve"]))


def test_series_over_seeds_by_hand():
    runs = [
        {"curve": [{"step": 0, "val_loss": 4.0}, {"step": 10, "val_loss": 2.0}, {"step": 20, "val_loss": 1.0}]},
        {"curve": [{"step": 0, "val_loss": 6.0}, {"step": 10, "val_loss": math.inf}]},
    ]
    gathered = series(runs)
    assert gathered.steps.tolist() == [0, 10, 20]
    np.testing.assert_array_equal(gathered.values, [[4, 2, 1], [6, math.nan, math.nan]])
    np.testing.assert_array_equal(gathered.mean, [5, math.nan, math.nan])
    assert gathered.end == 5
    assert not gathered.complete
    assert series(runs[:1]).complete
    assert gathered.since(10).steps.tolist() == [10, 20]
    assert gathered.since(10).end == 1  # No step has both seeds: the last value there is.


def test_mean_line_and_band_are_those_of_the_seeds(make_runs):
    runs = make_runs(("dsc",))
    axes = figures.loss_curves(runs).axes[0]
    curves = np.array([[point["val_loss"] for point in run["curve"]] for run in runs])
    drawn = [line.get_ydata() for line in axes.lines if len(line.get_ydata()) == curves.shape[1]]
    np.testing.assert_allclose(drawn, [*curves, curves.mean(axis=0)])
    band = axes.collections[0].get_paths()[0].vertices[:, 1]
    assert (band.min(), band.max()) == pytest.approx((curves.min(), curves.max()))


def test_zoom_keeps_the_last_half_and_labels_the_end(make_runs):
    runs = make_runs(("dense", "dsc"))
    figure = figures.loss_curves(runs, zoom=True)
    assert min(line.get_xdata().min() for line in figure.axes[0].lines) == 1000
    end = np.mean([run["curve"][-1]["val_loss"] for run in runs if run["method"] == "dsc"])
    assert f"DSC {end:.3f}" in texts(figure)


def test_exploding_run_does_not_stretch_the_others(make_runs):
    runs = make_runs()
    calm = figures.loss_curves(runs, zoom=True).axes[0].get_ylim()
    for point in runs[-1]["curve"][4:]:
        point["val_loss"] = 1e6
    figure = figures.loss_curves(runs, zoom=True)
    assert figure.axes[0].get_ylim()[1] < 1.3 * calm[1]
    assert any(text.startswith("DSC") and text.endswith("↑") for text in texts(figure))
    assert figures.loss_curves(runs).axes[0].get_ylim()[1] < 10


def test_diverged_seed_is_named_in_the_label(make_runs):
    runs = make_runs()
    runs[-1]["curve"][-1]["val_loss"] = math.nan
    labels = texts(figures.loss_curves(runs))
    assert "DSC (NaN)" in labels
    assert "Dense" in labels


def test_points_stand_at_their_parameters_latency_and_loss(make_runs):
    runs = make_runs()
    loss = np.mean([run["val_loss_best"] for run in runs if run["method"] == "dsc"])
    latency = np.median([run["latency_ms"]["median"] for run in runs if run["method"] == "dsc"])

    def points(figure):
        lines = [
            line for line in figure.axes[0].lines if line.get_marker() == "D" and line.get_color() == COLORS["dsc"]
        ]
        return [(float(line.get_xdata()[0]), float(line.get_ydata()[0])) for line in lines]

    assert points(figures.loss_against_parameters(runs)) == [pytest.approx((35.01, loss)), pytest.approx((28.0, loss))]
    assert points(figures.loss_against_latency(runs)) == [pytest.approx((latency, loss))]


def test_method_without_latency_is_left_out_of_that_figure(make_runs):
    runs = make_runs()
    for run in runs[:2]:
        run["latency_ms"] = {"median": math.nan, "q1": math.nan, "q3": math.nan}
    assert "Dense" not in texts(figures.loss_against_latency(runs))
    assert "DSC" in texts(figures.loss_against_latency(runs))


def test_load_is_in_multiples_of_the_even_share(make_runs):
    runs = make_runs(("moe",), seeds=(1,))
    runs[0]["routing"]["layers"] = [{**runs[0]["routing"]["layers"][0], "num_atoms": 4, "load": [0.5, 0.25, 0.25, 0.0]}]
    axes = figures.load_distribution(runs, "moe").axes[0]
    (line,) = [line for line in axes.lines if line.get_marker() == "s"]
    assert line.get_ydata()[:3].tolist() == [2, 1, 1]
    assert line.get_ydata()[3] == axes.get_ylim()[0]  # Never selected: zero lies on the lower edge.
    assert line.get_xdata().tolist() == [0.125, 0.375, 0.625, 0.875]


def test_layer_without_loads_is_left_out_and_keeps_its_number(make_runs):
    runs = make_runs(("dsc",), seeds=(1,))
    runs[0]["routing"]["layers"][0]["load"] = []
    axes = figures.load_distribution(runs, "dsc").axes[0]
    assert {text.get_text() for text in axes.texts} >= {"even", "layer 2", "layer 4"}
    assert sum(line.get_color() == COLORS["dsc"] for line in axes.lines) == 3


def test_load_figures_of_all_methods_share_their_limits(make_runs):
    runs = make_runs()
    limits = {
        figures.load_distribution(runs, method).axes[0].get_ylim() for method in ("moe", "mixture_of_loras", "dsc")
    }
    assert len(limits) == 1


def test_gate_figure_shows_recorded_values(make_runs):
    runs = make_runs(("moe", "dsc"), seeds=(42,))
    strength, gate = figures.gate_history(runs).axes
    expected = runs[-1]["routing"]["history"]
    assert strength.lines[0].get_ydata().tolist() == [point["strength"] for point in expected]
    assert gate.lines[0].get_ydata().tolist() == [point["gate"] for point in expected]


@pytest.mark.parametrize("case", ["one evaluation", "one seed", "all NaN", "no routing", "dense only"])
def test_every_figure_survives_thin_data(make_runs, case):
    runs = make_runs(**{"one evaluation": {"evaluations": 0}, "one seed": {"seeds": (1,)}}.get(case, {}))
    for run in runs:
        if case == "all NaN":
            run.update(val_loss_best=math.nan, val_loss_final=math.nan, test_loss=math.nan)
            run["curve"] = [{**point, "val_loss": math.nan} for point in run["curve"]]
        if case == "no routing":
            run["routing"] = None
    if case == "dense only":
        runs = runs[:2]
    for draw in ALL:
        svg = figures.to_svg(draw(runs), "x", "what it shows")
        assert "nan" not in "".join(ElementTree.fromstring(svg).itertext()).lower()


def test_svg_stands_by_itself(make_runs):
    svg = figures.to_svg(figures.loss_curves(make_runs()), "fig-a", 'curves: "a" < b & c')
    root = ElementTree.fromstring(svg)
    assert root.get("role") == "img"
    assert root.get("aria-label") == 'curves: "a" < b & c'
    assert root.get("viewBox") == "0 0 480 310"
    assert root.get("width") is None
    ids = [element.get("id") for element in root.iter() if element.get("id")]
    assert len(ids) == len(set(ids))
    assert all(name == "fig-a" or name.startswith("fig-a-") for name in ids)
    links = [value for element in root.iter() for key, value in element.attrib.items() if key.endswith("href")]
    assert links
    assert {link[1:] for link in links} <= set(ids)
    assert "DSC" in [element.text for element in root.iter(f"{SVG}text")]
    assert "font-family" not in svg


def test_svg_colours_are_variables_with_a_fallback(make_runs):
    svg = figures.to_svg(figures.loss_curves(make_runs()), "x", "")
    assert f"var(--dsc, {COLORS['dsc']})" in svg
    bare = svg
    for name, color in COLORS.items():
        bare = bare.replace(f"var(--{name}, {color})", "")
    assert "#" not in bare.replace("url(#", "").replace('href="#', "").replace("#x *{", "")


def test_same_runs_give_the_same_svg(make_runs):
    first, second = (figures.to_svg(figures.loss_curves(make_runs()), "x", "") for _ in range(2))
    assert first == second


def test_spread_keeps_order_gap_and_bounds():
    assert spread([10, 50, 90], 15) == [10, 50, 90]
    assert spread([50, 50], 10) == [45, 55]
    assert spread([55, 50, 52], 10) == pytest.approx([62 + 1 / 3, 42 + 1 / 3, 52 + 1 / 3])
    placed = spread([3, 1, 2, 100], 10, low=0, high=100)
    assert placed == pytest.approx([20, 0, 10, 100])
    assert spread([99, 98], 10, low=0, high=100) == pytest.approx([100, 90])
    assert spread([], 10) == []


def test_boxes_overlap_by_area():
    assert Box(0, 0, 4, 4).overlap(Box(2, 3, 6, 6)) == 2
    assert Box(0, 0, 1, 1).overlap(Box(2, 0, 3, 1)) == 0
    assert Box.beside(10, 5, 4, 2, "right") == Box(6, 4, 10, 6)


def test_end_labels_do_not_touch(make_runs):
    figure = figures.loss_curves(make_runs())
    heights = sorted(text.xy[1] for text in figure.axes[0].texts if text.get_text() in {"Dense", "DSC", "Standard MoE"})
    height_in_units = figure.axes[0].get_position().height * figure.get_size_inches()[1] * 72
    assert len(heights) == 3
    assert min(np.diff(heights)) * height_in_units >= 14.9


def test_limits_leave_room_even_around_one_value():
    assert pad_limits([1.0, 3.0, math.nan], 0.1) == pytest.approx((0.8, 3.2))
    low, high = pad_limits([2.0])
    assert low < 2 < high
    low, high = pad_limits([0.0])
    assert low < 0 < high


def _luminance(color):
    channels = [int(color[start : start + 2], 16) / 255 for start in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize(("side", "page"), [(0, "#ffffff"), (1, "#14181f")])
@pytest.mark.parametrize("name", [*METHODS, "label"])
def test_text_colours_have_contrast_on_either_page(side, page, name):
    lighter, darker = sorted((_luminance(PALETTE[name][side]), _luminance(page)), reverse=True)
    assert (lighter + 0.05) / (darker + 0.05) >= 4.5


def test_figures_leave_pyplot_alone():
    figure = new_figure()
    add_axes(figure, "x", "y")
    import matplotlib.pyplot as plt

    assert plt.get_fignums() == []
