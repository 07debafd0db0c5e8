"""Figures: what they draw, how variants are told apart, and that they stand on a page by themselves."""

import math
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest

from torchdsc.baselines.methods import METHODS
from torchdsc.lab.experiment.intervals import TIMES
from torchdsc.lab.figures.costs import Cost, draw_costs
from torchdsc.lab.figures.labels import label_text, label_texts, spread
from torchdsc.lab.figures.lines import draw_curves, draw_rates
from torchdsc.lab.figures.loads import draw_load_history, draw_loads
from torchdsc.lab.figures.looks import Group, Look, choose_looks
from torchdsc.lab.figures.series import Series
from torchdsc.lab.figures.style import COLORS, PALETTE, pad_limits, to_svg

LOOKS = {"Dense": Look("dense", "o"), "DSC": Look("dsc", "D"), "other DSC": Look("dsc", "D", (4, 1.5), is_hollow=True)}


def texts(figure):
    """Labels at the right, after the name of the y axis."""
    return [text.get_text() for text in figure.axes[0].texts[1:]]


def series(*ends, start=6.0):
    """Straight lines from ``start``, one a seed."""
    return Series.of([{step: end + (start - end) * (1 - step / 100) for step in range(0, 101, 10)} for end in ends])


def draw(found, **options):
    return draw_curves(found, LOOKS, "loss", **options)


def test_series_over_seeds_and_cases_by_hand():
    gathered = Series.of([{0: 4.0, 10: 2.0, 20: 1.0}, {0: 6.0, 10: math.inf}])
    np.testing.assert_array_equal(gathered.values, [[4, 2, 1], [6, math.nan, math.nan]])
    np.testing.assert_array_equal(gathered.mean, [5, math.nan, math.nan])
    assert (gathered.end, gathered.is_complete, gathered.num_points) == (5, False, 3)
    # No step has both seeds: the last value there is.
    assert gathered.since(10).end == 1
    cases = [(0, {5: 1.0, 10: 2.0}), (0, {10: 4.0, 20: 5.0}), (1, {10: 9.0})]
    mean = Series.collect([{"seed": seed, "curve": curve} for seed, curve in cases], lambda run: run["curve"])
    # Steps that both cases have, of the seed that has both.
    assert (mean.places.tolist(), mean.values.tolist()) == ([10], [[3]])


def test_line_and_band_are_those_of_the_seeds():
    axes = draw({"DSC": series(3.0, 3.4)}).axes[0]
    assert axes.lines[0].get_ydata()[[0, -1]] == pytest.approx((6.0, 3.2))
    band = axes.collections[0].get_paths()[0].vertices[:, 1]
    assert (band.min(), band.max()) == pytest.approx((3.0, 6.0))


def test_last_half_is_labelled_with_its_end():
    figure = draw({"Dense": series(3.2), "DSC": series(3.0, 3.1)}, is_zoomed=True)
    assert figure.axes[0].lines[0].get_xdata().min() == 50
    assert texts(figure) == ["Dense 3.200", "DSC 3.050"]


@pytest.mark.parametrize("sign", [1, -1])
def test_exploding_run_does_not_stretch_the_others(sign):
    exploding = Series.of([{step: sign * (3.0 if step < 60 else 1e6) for step in range(0, 101, 10)}])
    calm = series(sign * 3.0, start=sign * 6)
    figure = draw({"Dense": calm, "DSC": exploding}, is_zoomed=True, lower_is_better=sign > 0)
    assert max(map(abs, figure.axes[0].get_ylim())) < 4
    assert any(text.startswith("DSC") and text[-1] in "↑↓" for text in texts(figure))


def test_whole_axis_has_all_values_and_no_offset():
    high = Series.of([{0: 32.0, 100: 32.01}])
    figure = draw({"Dense": series(0.2, start=0.1), "DSC": high}, scale="whole")
    low, top = figure.axes[0].get_ylim()
    assert low < 0.1
    assert top > 32.01
    assert not draw({"DSC": high}, scale="whole").axes[0].yaxis.get_major_formatter().get_useOffset()


def test_diverged_seed_is_named_and_a_single_point_is_no_figure():
    assert texts(draw({"DSC": Series.of([{0: 6.0, 50: 4.0, 100: math.nan}]), "Dense": series(3.1)}))[0] == "DSC (NaN)"
    assert draw({"DSC": Series.of([{100: 3.0}])}) is None


def test_variants_of_a_method_share_its_colour_and_differ():
    methods = {f"DSC {index}": "dsc" for index in range(10)} | {"LoRA": "lora", "Dense": "dense"}
    looks = choose_looks(methods, [Group("", list(methods))], "Dense")
    named = [look for look in looks.values() if look.is_named]
    # The best nine, and the reference.
    assert [name for name, look in looks.items() if not look.is_named] == ["DSC 9", "LoRA"]
    assert len(set(named)) == 10
    assert {looks[f"DSC {index}"].color for index in range(9)} == {"dsc"}
    assert looks["DSC 9"].ink == COLORS["faint"]
    assert looks["LoRA"].color in set(METHODS) - {"dsc", "dense"}


def test_marks_stand_at_their_costs_and_side_by_side():
    costs = {
        "Dense": Cost(3.0, (3.0, 3.0), 4.5, 0.1),
        "DSC": Cost(3.0, (2.0, 3.0), 4.45, 0.1),
        "other DSC": Cost(2.0, (2.0, 2.0), 4.4, 0.0),
    }
    figure = draw_costs(costs, LOOKS, ["DSC"], "size", "loss")
    marks = [line for line in figure.axes[0].lines if line.get_markersize() == 7]
    places = [(float(line.get_xdata()[0]), float(line.get_ydata()[0])) for line in marks]
    assert places[0] == pytest.approx((3.0, 4.5))
    assert places[2] == pytest.approx((2.0, 4.4))
    assert places[1][1] == 4.45
    pixels = figure.axes[0].transData.transform(places)[:, 0]
    assert abs(pixels[1] - pixels[0]) == pytest.approx(9)
    assert texts(figure) == ["DSC"]
    assert draw_costs({"DSC": costs["DSC"]}, LOOKS, [], "size", "loss") is None
    exact = draw_costs(costs, LOOKS, ["DSC"], "size", "loss", side_by_side=False)
    assert [line.get_xdata()[0] for line in exact.axes[0].lines if line.get_markersize() == 7] == [3.0, 3.0, 2.0]


def test_path_of_a_cost_begins_at_its_mark():
    costs = {"Dense": Cost(3.0, (3.0, 3.0), 4.5, 0.1), "DSC": Cost(2.0, (2.0, 2.0), 4.4, 0.0, ((1.5, 4.7), (1.0, 4.9)))}
    axes = draw_costs(costs, LOOKS, ["DSC"], "size", "loss").axes[0]
    [path] = [line for line in axes.lines if line.get_linestyle() == ":"]
    assert [*path.get_xdata(), *path.get_ydata()] == pytest.approx([2.0, 1.5, 1.0, 4.4, 4.7, 4.9])
    assert axes.get_xlim()[0] < 1.0
    assert axes.get_ylim()[1] > 4.9


def test_costs_far_apart_with_a_zero_among_them():
    costs = {name: Cost(at, (at, at), 1.0, 0.0) for name, at in zip(LOOKS, (0.0, 0.01, 20.0), strict=True)}
    axes = draw_costs(costs, LOOKS, [], "size", "score").axes[0]
    assert axes.get_xscale() == "symlog"
    assert axes.get_xlim()[0] < 0


def test_loads_are_in_multiples_of_the_even_share():
    layer = {"num_atoms": 4, "load": [0.5, 0.25, 0.25, 0.0]}
    runs = {"DSC": [{"routing": {"layers": [{**layer, "load": []}, layer]}}]}
    axes = draw_loads(runs, LOOKS, "DSC").axes[0]
    (line,) = [line for line in axes.lines if line.get_marker() == "D"]
    # Never selected: zero lies on the lower edge.
    assert line.get_ydata().tolist() == [2, 1, 1, axes.get_ylim()[0]]
    assert {text.get_text() for text in axes.texts[1:]} == {"even", "layer 2"}
    assert draw_loads({"DSC": [{"routing": None}]}, LOOKS, "DSC") is None


def test_loads_over_training_are_stacked_from_the_unused_up():
    def run(*unused):
        loads = [[share, 0, 0, 0, 1 - share, 0, 0] for share in unused]
        points = [{"step": 10 * place, "histogram": histogram} for place, histogram in enumerate(loads)]
        return {"routing": {"history": [*points, {"step": 99}]}}

    axes = draw_load_history([run(0.0, 0.5), run(0.0, 0.3, 1.0)], LOOKS["DSC"]).axes[0]
    tops = [band.get_paths()[0].vertices[:, 1].max() for band in axes.collections]
    assert tops == pytest.approx([0.4, 0.4, 0.4, 0.4, 1.0, 1.0, 1.0])
    assert [text.get_text() for text in axes.texts[1:]] == ["unused", f"to 2{TIMES}"]
    assert axes.get_xlim() == (0, 10)
    assert draw_load_history([run(0.0)], LOOKS["DSC"]) is None
    assert draw_load_history([{"routing": None}], LOOKS["DSC"]) is None


def test_rates_leave_out_what_failed():
    trials = {"DSC": Series.of([{0.001: 4.0, 0.01: 3.5, 0.1: math.nan}]), "Dense": Series.of([{0.001: 90.0}])}
    figure = draw_rates(trials, LOOKS, "loss", lower_is_better=True)
    assert figure.axes[0].get_ylim()[1] < 5
    assert texts(figure) == ["DSC", "Dense ↑"]
    assert draw_rates({"DSC": Series.of([{0.1: 3.0}])}, LOOKS, "loss", lower_is_better=True) is None


def test_svg_stands_by_itself_and_takes_the_colours_of_its_page():
    svgs = [to_svg(draw({"DSC": series(3.0)}), "fig-a", 'curves: "a" < b & c') for _ in range(2)]
    assert svgs[0] == svgs[1]
    root = ElementTree.fromstring(svgs[0])
    assert root.get("aria-label") == 'curves: "a" < b & c'
    assert root.get("width") is None
    ids = [element.get("id") for element in root.iter() if element.get("id")]
    assert len(ids) == len(set(ids))
    assert all(name == "fig-a" or name.startswith("fig-a-") for name in ids)
    assert "DSC" in [element.text for element in root.iter("{http://www.w3.org/2000/svg}text")]
    bare = svgs[0]
    for name, color in COLORS.items():
        bare = bare.replace(f"var(--{name}, {color})", "")
    assert "#" not in bare.replace("url(#", "").replace('href="#', "").replace("#fig-a *{", "")


def test_labels_keep_order_gap_and_bounds():
    assert spread([10, 50, 90], 15) == [10, 50, 90]
    assert spread([55, 50, 52], 10) == pytest.approx([62 + 1 / 3, 42 + 1 / 3, 52 + 1 / 3])
    assert spread([3, 1, 2, 100], 10, low=0, high=100) == pytest.approx([20, 0, 10, 100])
    assert label_text("a $b$ name") == r"a \$b\$ name"
    assert label_text("one of very many names", 12) == "one of…names"


def test_labels_of_two_variants_never_read_alike():
    names = [f"DSC by embeddings, {what}quiet 0.03, replay, 1e-2" for what in ("", "one bank, ")]
    texts = label_texts([*names, "LoRA"])
    assert [*texts] == [*names, "LoRA"]
    assert len({*texts.values()}) == 3
    assert len({label_text(name) for name in names}) == 1, "they would, cut alike"
    assert all(len(text) < len(name) or text == name for name, text in texts.items())


@pytest.mark.parametrize(
    ("values", "limits"), [([1.0, 3.0, math.nan], (0.8, 3.2)), ([2.0], (1.9, 2.1)), ([0.0], (-1, 1))]
)
def test_limits_leave_room(values, limits):
    assert pad_limits(values, 0.1) == pytest.approx(limits)


def _luminance(color):
    channels = [int(color[start : start + 2], 16) / 255 for start in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("name", [*METHODS, "label"])
def test_text_colours_have_contrast_on_either_page(side, name):
    lighter, darker = sorted((_luminance(PALETTE[key][side]) for key in (name, "page")), reverse=True)
    assert (lighter + 0.05) / (darker + 0.05) >= 4.5
