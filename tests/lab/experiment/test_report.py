"""The report: a page that is whole, safe and self-contained, whatever the runs came to."""

import copy
import math
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from torchdsc.baselines.methods import METHODS
from torchdsc.lab.experiment import report
from torchdsc.lab.experiment.config import Experiment
from torchdsc.lab.experiment.intervals import DASH, MINUS, TIMES
from torchdsc.lab.experiment.provenance import provenance_tables
from torchdsc.lab.experiment.report import render_report, write_report
from torchdsc.lab.experiment.results import Results

EXPERIMENTS = Path(__file__).parents[3] / "experiments"
EVIL = "<script>alert('x')</script> & $a$ ${b} {{ c }}"


class Page(HTMLParser):
    """Checks nesting while reading, and keeps tags, ids and text."""

    def __init__(self, page):
        super().__init__()
        self.open, self.tags, self.ids, self.words = [], [], [], []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.handle_startendtag(tag, attrs)
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.ids += [value for key, value in attrs if key == "id"]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)

    @property
    def text(self):
        """With signs that a keyboard has."""
        return " ".join(" ".join(self.words).split()).translate({ord(MINUS): "-", ord(DASH): "-", ord(TIMES): "x"})

    @property
    def figures(self):
        return [attributes for tag, attributes in self.tags if tag == "svg" and attributes.get("role") == "img"]


@pytest.fixture(scope="module")
def pages():
    """The reports of the experiments here, rendered once each."""
    found = {}
    return lambda name: found.setdefault(name, render_report(Results.read(EXPERIMENTS / name)))


@pytest.fixture
def small():
    """Results of four variants with two seeds, free to be changed, with all that new records have."""
    results = copy.deepcopy(Results.read(EXPERIMENTS / "small"))
    for run in results.runs:
        run |= {"bytes_per_token": 3.5, "sample": {"prompt": "Once there", "text": " was a model."}}
        for point in run["train_curve"]:
            point["grad_norm"] = 1.0 + 1 / point["step"]
    return results


def test_losses_are_told_as_they_are(pages):
    """Of causal LMs, whose score is their loss with a minus."""
    text = Page(pages("stories")).text
    assert "LoRA 8 has the lowest loss of 2 variants, 2.818 ± 0.011: -0.139 ± 0.036" in text
    assert "score" not in text.lower()
    assert "score" in Page(pages("glue")).text


def test_what_is_forgotten_is_drawn(pages):
    """The measure against a column of the task that is a cost."""
    assert "Loss against forgotten. Upright lines" in Page(pages("stories")).text
    assert "Dotted" not in Page(pages("stories")).text
    assert "against forgotten" not in Page(pages("glue")).text, "where it was not measured"


def test_what_is_forgotten_at_less_of_the_update_is_drawn():
    results = copy.deepcopy(Results.read(EXPERIMENTS / "stories"))
    before = {"retain_loss_before": 1.0, "retain_loss_after": 1.25}
    for run in results.runs:
        run["scaled"] = [{"scale": 0.5, "loss": 3.5, **before}, {"scale": 0.25, "loss": 4.0, **before}]
    page = Page(render_report(results))
    assert "Dotted: with less and less of what was learnt." in page.text
    [column] = [column for column in results.task.columns if column.cost]
    drawing = report.Page(results)
    assert drawing._path(column, results.runs) == ((0.25, 3.5), (0.25, 4.0))
    assert any(line.get_linestyle() == ":" for line in drawing.draw_cost(column).axes[0].lines)


def test_what_no_other_beats_comes_first():
    page = report.Page(Results.read(EXPERIMENTS / "forgetting"))
    [column] = page.costs
    points = {row.name: (row.mean, sum(map(column.value, row.runs)) / len(row.runs)) for row in page.rows if row.runs}
    ranked = page.ranked_by(column)
    assert sorted(ranked) == sorted(points)
    unbeaten = {
        name
        for name, (loss, cost) in points.items()
        if not any(a <= loss and b <= cost and (a, b) != (loss, cost) for a, b in points.values())
    }
    assert 2 < len(unbeaten) < len(points)
    assert set(ranked[: len(unbeaten)]) == unbeaten


@pytest.mark.parametrize("method", METHODS)
def test_every_methods_marker_has_a_shape(method):
    page = (Path(report.__file__).parent / "page.html.j2").read_text()
    assert f'"{METHODS[method].marker[0]}": "M' in page


@pytest.mark.parametrize("name", ["glue", "levers", "opponents", "scaling", "small", "stories"])
def test_page_is_whole_and_loads_nothing(pages, name):
    page = Page(pages(name))
    assert len(page.ids) == len(set(page.ids))
    names = [tag for tag, _ in page.tags]
    assert not {"script", "link", "img", "iframe", "object", "embed"} & set(names)
    assert names.count("table") == names.count("caption")
    assert names.count("h1") == 1
    assert all(attributes["aria-label"] for attributes in page.figures)
    for _, attributes in page.tags:
        assert not any(key.startswith("on") for key in attributes)
        for key in {"src", "href", "xlink:href"} & set(attributes):
            target = attributes[key]
            assert target in {"results.json", "config.yaml", "table.md"} or target[1:] in page.ids
    assert set(re.findall(r"url\(#([^)]+)\)", pages(name))) <= set(page.ids)
    assert set(re.findall(r"https?://[^\"' <]*", pages(name))) <= {
        "http://www.w3.org/2000/svg",
        "http://www.w3.org/1999/xlink",
    }
    light, dark = re.findall(r":root \{ color-scheme: \w+; (.*?) *\}", pages(name))
    assert set(re.findall(r"(--[\w-]+):", light)) == set(re.findall(r"(--[\w-]+):", dark))


@pytest.mark.parametrize(
    ("name", "sections"),
    [
        ("small", ["Results", "Differences", "Learning", "Cost", "Health of the routing", "Every run"]),
        ("glue", ["Results", "Differences", "Cost", "Trials", "Every run"]),
        ("opponents", ["Results", "Trials"]),
    ],
)
def test_sections_without_data_are_left_out(pages, name, sections):
    links = re.search(r"<nav.*?</nav>", pages(name), re.DOTALL).group()
    assert re.findall(r">([^<>]+)</a>", links) == [*sections, "Make it again"]


def test_same_results_give_the_same_page_and_it_is_written(small, tmp_path):
    file = write_report(small, tmp_path / "out")
    assert file.name == "report.html"
    assert file.read_text(encoding="utf-8") == render_report(copy.deepcopy(small))


def test_results_and_what_they_are_made_of(small):
    page = Page(render_report(small)).text
    for words in (
        "Four methods at equal budgets on WikiText-2",
        "No clear winner: DSC (4.426 ± 0.020)",
        "-0.090 ± 0.012 to Standard MoE: better",
        "42: -0.091, 1337: -0.089",
        "0.81x (0.76-0.85)",
        "1.04x (0.95-1.14)",
        "Parameters 1.73 M Batch",
        "Norm of the gradient.",
        "Once there was a model.",
        "torchdsc compare --preset small",
        "learning_rate 0.004",
        small.runs[0]["commit"][:12],
        "2.13.0+cpu",
    ):
        assert words in page


def test_best_values_are_told_only_where_they_differ(small):
    assert "its best" not in render_report(small)
    small.runs[0]["val_loss_best"] -= 0.01
    assert "its best" in render_report(small)


def test_everything_from_records_is_escaped(small):
    values = small.experiment.model_dump()
    values["title"] = EVIL
    for variant in values["variants"]:
        variant["name"] += EVIL
        variant["against"] = variant["against"] and [name + EVIL for name in variant["against"]]
    values["reference"] = values["reference"] and values["reference"] + EVIL
    for run in small.runs:
        run.update(variant=run["variant"] + EVIL, description=EVIL, commit=EVIL, command=EVIL)
        run.update(versions={EVIL: EVIL}, hardware={EVIL: EVIL}, data={EVIL: EVIL}, config={EVIL: EVIL})
        run["sample"] = {"prompt": EVIL, "text": EVIL}
    failed = [{**small.runs[0], "error": EVIL}]
    timing = {name + EVIL: value for name, value in small.timing.items()}
    page = render_report(replace(small, experiment=Experiment.model_validate(values), failed=failed, timing=timing))
    assert "script" not in {tag for tag, _ in Page(page).tags}
    assert Page(page).text.count(EVIL) > 50


def _diverge(results, chosen):
    for run in results.runs:
        if chosen(run):
            run.update(val_loss_final=math.nan, val_loss_best=math.nan, test_loss=math.nan, diverged_at_step=700)
            run["curve"] = [{**p, "val_loss": p["val_loss"] if p["step"] < 700 else math.nan} for p in run["curve"]]


def _part(results, chosen):
    return replace(results, runs=[run for run in results.runs if chosen(run)])


def _without_routing(results):
    for run in results.runs:
        run["routing"] = {"history": [], "layers": []}


def _sign(results, *steps):
    """A sign of failure at some of the evaluations of a run."""
    for run in results.runs:
        if run["variant"] == "DSC" and run["seed"] == 42:
            for place in steps:
                run["routing"]["history"][place]["findings"] = ["atoms-turn"]


def _null_routing(results):
    for run in results.runs:
        for layer in (run["routing"] or {"layers": []})["layers"]:
            layer.update(utilization=math.nan, effective_atoms=math.nan, strength=None, gate=math.nan, load=[])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda r: _diverge(r, lambda run: True), "No run reached a finite validation loss."),
        (lambda r: _diverge(r, lambda run: run["variant"] == "DSC" and run["seed"] == 42), "Training diverged: DSC"),
        (lambda r: _part(r, lambda run: run["seed"] == 42), "as one seed decides nothing"),
        (lambda r: _part(r, lambda run: run["variant"] == "DSC"), "DSC reached a validation loss of 4.426"),
        (lambda r: _part(r, lambda run: run["variant"] != "DSC" or run["seed"] == 42), "Not all runs are done: DSC."),
        (lambda r: _part(r, lambda run: False), "No trial reached a finite validation loss."),
        (lambda r: replace(r, runs=[], failed=[{**r.runs[0], "error": "no memory"}]), "no memory"),
        (lambda r: replace(r, failed=[{**r.runs[0], "error": "no memory"}]), "Runs that failed"),
        (lambda r: replace(r, timing={"Dense": r.timing["Dense"], "DSC": None}), "Time of a forward pass"),
        (lambda r: replace(r, experiment=r.experiment.part(["DSC"])), "there is none to compare it with"),
        (_without_routing, "Every run"),
        (_null_routing, "How much is in use was not recorded"),
        (lambda r: _sign(r, 0, 1), "A sign of failure was seen in training, atoms-turn: DSC."),
        (lambda r: _sign(r, -1), "A sign of failure was seen in training, atoms-turn: DSC."),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_whatever_the_runs_came_to(small, change, words):
    page = Page(render_report(change(small) or small))
    assert words in page.text
    assert "nan" not in " ".join(page.words).split()
    assert "in use" not in page.text or "Health of the routing" in page.text


def test_a_sign_that_passes_is_not_told(small):
    _sign(small, 0, 2)
    assert "A sign of failure" not in Page(render_report(small)).text


def test_many_variants_are_drawn_by_size_and_in_part(pages):
    scaling, levers = Page(pages("scaling")), Page(pages("levers"))
    curves = [figure for figure in scaling.figures if figure["aria-label"].startswith("Validation loss.")]
    assert len(curves) == 3
    # The headline and the title of a group tell its size alike.
    assert scaling.text.count("1.72 M to 1.74 M parameters, 1,200 steps") > 2
    assert "At 1.72 M to 1.74 M parameters, 1,200 steps: DSC best 128 has the lowest" in scaling.text
    assert "In colour: the best 10." in levers.text
    assert "difference to together (nats per token)" in levers.text


def test_deviations_are_spoken_of_only_where_there_are_seeds(pages):
    assert "± after a figure is the standard deviation over seeds" in Page(pages("scaling")).text
    alone = Page(pages("levers")).text
    assert "over seeds" not in alone
    assert "leaves zero out, which takes two seeds." in alone


def test_settings_that_variants_share_are_told_once():
    facts = {"commit": "0" * 40, "versions": {}, "hardware": {"threads": 1}, "data": {}}
    configs = [("a", {"steps": 5, "rate": 1}), ("a", {"steps": 9, "rate": 1}), ("b", {"steps": 9, "rate": 2})]
    configs.append(("b", {"steps": 5, "rate": 2}))
    _, same, own = provenance_tables([{**facts, "variant": name, "config": config} for name, config in configs])
    assert same.parts[0][1] == [["steps", "5, 9"]]
    assert own.parts[0][1] == [["a", "rate 1"], ["b", "rate 2"]]


def test_narrow_pages_scroll_figures_rather_than_shrink_their_text(pages):
    page = pages("small")
    narrow = page[page.index("@media (max-width: 700px)") : page.index("@media print")]
    assert "figure svg { min-width: calc(.92 * var(--width)); }" in narrow
    widths = [float(width) for width in re.findall(r'<figure style="--width: (\d+)px">', page)]
    # A unit is a pixel: text is 12 high.
    assert widths == [round(float(width)) for width in re.findall(r'role="img".*?viewBox="0 0 ([\d.]+) ', page)]


def test_layers_and_runs_of_a_fault_are_told_apart(small):
    for run in small.runs:
        for layer in run["routing"]["layers"][:3] if run["variant"] == "DSC" else []:
            layer["gate"] = 0.9995
    assert "DSC in 6 of 8 layers (over 2 runs)" in Page(render_report(small)).text
