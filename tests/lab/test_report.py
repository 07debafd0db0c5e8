"""The report: its sentences against made-up results, and a page that is whole, safe and self-contained."""

from __future__ import annotations

import math
import re
from html.parser import HTMLParser

import pytest

from torchdsc.lab.report import findings, render_report, write_report
from torchdsc.lab.report.sections import flatten, split_config
from torchdsc.lab.summaries import summarize

VOID = {"meta", "br", "hr", "img", "link", "input"}


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
        if tag not in VOID:
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
        return " ".join(" ".join(self.words).split())


@pytest.fixture(scope="module")
def usual_page(usual_runs):
    """The report of the usual made-up runs, rendered once."""
    return render_report(usual_runs)


def set_best(runs, **losses):
    for method, values in losses.items():
        for run, value in zip([run for run in runs if run["method"] == method], values, strict=True):
            run.update(val_loss_best=value, val_loss_final=value, test_loss=value)
    return runs


def say(runs):
    return findings.headline(summarize(runs))


def check(runs):
    return findings.checks(runs, summarize(runs))


def test_headline_names_a_clear_winner_and_the_margin(make_runs):
    runs = set_best(make_runs(("dense", "moe", "dsc")), dense=(3.5, 3.52), moe=(3.45, 3.47), dsc=(3.4, 3.42))
    assert say(runs) == (
        "DSC has the lowest validation loss: 3.410 ± 0.014, 0.050 below Standard MoE, more than the seeds vary."
    )


def test_headline_does_not_name_a_winner_within_noise(make_runs):
    runs = set_best(make_runs(("dense", "moe", "dsc")), dense=(3.9, 3.92), moe=(3.41, 3.44), dsc=(3.4, 3.42))
    assert say(runs) == (
        "No clear winner: DSC (3.410 ± 0.014) and Standard MoE (3.425 ± 0.021) differ by no more than the seeds vary."
    )


def test_headline_with_one_seed_claims_nothing(make_runs):
    runs = set_best(make_runs(("dense", "dsc"), seeds=(1,)), dense=(3.5,), dsc=(3.4,))
    assert say(runs) == (
        "DSC has the lowest validation loss: 3.400, 0.100 below Dense. With one seed this cannot be told from noise."
    )
    mixed = [*make_runs(("dense",), seeds=(1,)), *make_runs(("dsc",))]
    assert say(mixed).endswith("With one seed of Dense this cannot be told from noise.")


def test_headline_with_diverged_runs_one_method_or_nothing(make_runs):
    runs = make_runs(("dense", "dsc"), (1, 2, 3))
    assert "not all of its runs stayed finite" in say(set_best(runs, dense=(9, 9, 9.1), dsc=(3, 3.1, math.nan)))
    assert say(set_best(make_runs(("dsc",), (1,)), dsc=(3.4,))).startswith("DSC reached a validation loss of 3.400.")
    one_left = say(set_best(make_runs(("dense", "dsc")), dense=(math.nan, None), dsc=(3.4, 3.4)))
    assert one_left.endswith("There is no other method with a finite loss to compare it with.")
    assert say(set_best(make_runs(("dsc",)), dsc=(math.nan, math.nan))) == "No run reached a finite validation loss."


def test_differences_are_paired_by_seed(make_runs):
    runs = set_best(make_runs(("dense", "moe", "dsc")), dense=(3.5, 3.7), moe=(3.39, 3.61), dsc=(3.4, 3.6))
    for run in runs:
        run["latency_ms"]["median"] = 60.0 if run["method"] == "dsc" else 40.0
    subject, (dense, moe) = findings.differences(runs, summarize(runs))
    assert subject.method == "dsc"
    assert dense.by_seed == pytest.approx({42: -0.1, 1337: -0.1})
    assert (dense.val, dense.test, dense.latency) == pytest.approx((-0.1, -0.1, 1.5))
    assert dense.active == pytest.approx(0.8)
    assert dense.verdict == "within noise"  # 3.6 ± 0.14 and 3.5 ± 0.14.
    assert moe.by_seed == pytest.approx({42: 0.01, 1337: -0.01})
    assert moe.val == pytest.approx(0)


def test_differences_use_shared_seeds_only(make_runs):
    runs = set_best(make_runs(("dense", "dsc")), dense=(3.5, 3.7), dsc=(3.4, 2.0))
    _, (dense,) = findings.differences(runs[:1] + runs[2:], summarize(runs[:1] + runs[2:]))
    assert dense.by_seed == pytest.approx({42: -0.1})
    assert dense.val == pytest.approx(-0.1)
    assert dense.verdict == "one seed"


@pytest.mark.parametrize(
    ("dsc", "verdict"), [((3.4, 3.41), "lower"), ((3.6, 3.61), "higher"), ((3.4, None), "one seed")]
)
def test_verdicts(make_runs, dsc, verdict):
    runs = set_best(make_runs(("dense", "dsc")), dense=(3.5, 3.51), dsc=dsc)
    assert findings.differences(runs, summarize(runs))[1][0].verdict == verdict


def test_without_dsc_the_best_is_compared(make_runs):
    runs = set_best(make_runs(("dense", "moe")), dense=(3.5, 3.51), moe=(3.4, 3.41))
    assert findings.differences(runs, summarize(runs))[0].method == "moe"


def test_sound_comparison_raises_no_check(make_runs):
    assert check(make_runs()) == []


def test_checks_name_missing_and_diverged_runs(make_runs):
    runs = make_runs()
    runs[-1]["val_loss_final"] = math.nan
    found = check([run for run in runs if (run["method"], run["seed"]) != ("moe", 42)])
    assert found == [
        "Not run, or not finished: Standard MoE seed 42.",
        "Training diverged: DSC seed 1337 ended with a validation loss that is not finite.",
    ]


def test_checks_find_unequal_budgets_and_overfitting(make_runs):
    runs = make_runs(("dense", "dsc"))
    for run in runs[2:]:
        run.update(params_total=40_000_000, val_loss_best=3.0, val_loss_final=3.2)
    budgets, first, second = check(runs)
    assert budgets == "The parameter budgets are not equal: totals from 35.00 M to 40.00 M, 14.3% apart."
    assert first == "DSC seed 42 ends 0.200 above its best validation loss: it overfitted or diverged."
    assert second.startswith("DSC seed 1337 ends")


@pytest.mark.parametrize(
    ("key", "value", "word"),
    [
        ("tokens", 5, "tokens"),
        ("steps", 5, "steps"),
        ("corpus", {"name": "x", "sha256": "0"}, "corpus"),
        ("hardware", {"device": "other"}, "hardware"),
        ("versions", {}, "versions"),
        ("commit", "f00", "commit"),
    ],
)
def test_checks_find_runs_made_differently(make_runs, key, value, word):
    runs = make_runs()
    runs[2][key] = value
    (found,) = check(runs)
    assert found.startswith("The runs differ in ")
    assert word in found


def test_routing_reading_by_hand(make_runs):
    runs = make_runs(("dense", "dsc"), seeds=(1,))
    layer = runs[1]["routing"]["layers"][0]
    runs[1]["routing"]["layers"] = [
        {**layer, "num_atoms": 100, "utilization": 0.9, "effective_atoms": 40.0, "strength": 1.0, "gate": 0.7},
        {**layer, "num_atoms": 100, "utilization": 0.7, "effective_atoms": 60.0, "strength": 2.0, "gate": 0.9},
    ]
    (reading,) = findings.routing_findings(runs)
    assert reading.method == "dsc"
    assert reading.warnings == ()
    assert reading.text == (
        "80% of the atoms in use (least in any layer: 70%); effectively 50% of them (exp of the entropy of use); "
        "mean strength S 1.50, gate tanh S 0.80."
    )


@pytest.mark.parametrize(("method", "units"), [("moe", "experts"), ("mixture_of_loras", "LoRAs"), ("peer", "experts")])
def test_routing_reading_names_what_is_selected(make_runs, method, units):
    runs = [{**run, "method": method} for run in make_runs(("moe",))]
    (reading,) = findings.routing_findings(runs)
    assert f"of the {units} in use" in reading.text


@pytest.mark.parametrize(
    ("key", "value", "text"),
    [
        ("utilization", 0.2, "1 of 8 layers use less than 50% of their atoms: the rest is dead weight"),
        ("effective_atoms", 30.0, "1 of 8 layers concentrate on the equivalent of less than 10% of their atoms"),
        ("gate", 0.999, "1 of 8 layers have a saturated gate"),
        ("gate", 0.01, "1 of 8 layers have a collapsed gate"),
    ],
)
def test_routing_warnings(make_runs, key, value, text):
    runs = make_runs(("dsc",))
    assert findings.routing_findings(runs)[0].warnings == ()
    runs[1]["routing"]["layers"][2][key] = value
    (warning,) = findings.routing_findings(runs)[0].warnings
    assert warning.startswith(text)
    assert "worst: layer 3, seed 1337" in warning


def test_report_is_one_whole_file(make_runs, tmp_path):
    path = write_report(make_runs(), tmp_path / "new" / "folder")
    assert path == tmp_path / "new" / "folder" / "report.html"
    assert [file.name for file in path.parent.iterdir()] == ["report.html"]
    text = path.read_text(encoding="utf-8")
    assert text.startswith("<!DOCTYPE html>")
    assert text.rstrip().endswith("</html>")
    page = Page(text)
    assert len(page.ids) == len(set(page.ids))
    assert [tag for tag, _ in page.tags].count("svg") == 9
    assert [tag for tag, _ in page.tags].count("h1") == 1


def test_report_loads_nothing(usual_page):
    text = usual_page
    tags = Page(text).tags
    assert not {"script", "link", "img", "iframe", "object", "embed"} & {tag for tag, _ in tags}
    for _, attributes in tags:
        for key, value in attributes.items():
            assert not key.startswith("on")
            if key in {"src", "href", "xlink:href", "srcset", "data"}:
                assert value.startswith("#")
    assert "@import" not in text
    assert set(re.findall(r"url\((.)", text)) == {"#"}
    assert set(re.findall(r"https?://[^\"' <]*", text)) <= {
        "http://www.w3.org/2000/svg",
        "http://www.w3.org/1999/xlink",
    }


def test_report_references_exist(usual_page):
    text = usual_page
    ids = set(Page(text).ids)
    used = set(re.findall(r"url\(#([^)]+)\)", text)) | set(re.findall(r'href="#([^"]+)"', text))
    used |= set(re.findall(r'aria-labelledby="([^"]+)"', text))
    assert used
    assert used <= ids


def test_report_escapes_everything_from_the_records(make_runs):
    evil = "<script>alert('x')</script> & \"q\" $title"
    runs = make_runs(seeds=(42,))
    for run in runs:
        run.update(description=evil, commit=evil, command=evil)
        run.update(corpus={"name": evil, "sha256": evil}, versions={evil: evil}, hardware={evil: [evil]})
        run.update(config={evil: evil, "method": run["method"] + evil})
    text = render_report(runs)
    page = Page(text)
    assert "script" not in {tag for tag, _ in page.tags}
    assert page.text.count("<script>alert('x')</script> & \"q\" $title") > 10


def test_report_tables_have_headers_and_captions_and_figures_descriptions(usual_page):
    tags = Page(usual_page).tags
    names = [tag for tag, _ in tags]
    assert names.count("table") == names.count("caption")
    assert all(attributes.get("scope") in {"row", "col"} for tag, attributes in tags if tag == "th")
    labels = [attributes["aria-label"] for tag, attributes in tags if tag == "svg"]
    assert all(labels)
    assert "Final validation losses: Dense 3.4" in labels[0]
    assert ("html", {"lang": "en"}) in tags


def test_report_shows_the_result_and_how_to_make_it_again(make_runs):
    runs = set_best(make_runs(), dsc=(3.3, 3.32))
    page = Page(render_report(runs)).text
    assert "DSC has the lowest validation loss: 3.310 ± 0.014" in page
    for value in ("9f2b" * 16, "0123456789abcdef" * 2, runs[0]["command"], "2.13.0", "Example Accelerator", "0.0006"):
        assert value in page
    assert "3.3200" in page  # Each run by itself.


def test_report_marks_only_a_leader_bold(make_runs):
    clear = set_best(make_runs(), dsc=(3.3, 3.32))
    level = set_best(make_runs(("dense", "dsc")), dense=(3.4, 3.5), dsc=(3.3, 3.9))
    assert render_report(clear).count("<strong>3.310 ± 0.014</strong>") == 3
    assert render_report(clear).count("<strong>") == 3
    assert "<strong>" not in render_report(level)


def test_report_has_light_and_dark_colours_for_every_variable(usual_page):
    text = usual_page
    light, dark = re.findall(r":root \{ color-scheme: \w+; (.*?) \}", text)
    used = set(re.findall(r"var\((--[\w-]+)", text)) - {"--least"}
    for block in (light, dark):
        assert used <= set(re.findall(r"(--[\w-]+):", block))
    assert "@media screen and (prefers-color-scheme: dark)" in text


@pytest.mark.parametrize("case", ["one run", "all NaN", "no evaluation", "no routing", "empty routing", "null routing"])
def test_report_of_thin_records(make_runs, case):
    runs = make_runs()
    if case == "one run":
        runs = make_runs(("dsc",), (1,), steps=1, evaluations=0)
    for run in runs:
        if case == "all NaN":
            run.update(val_loss_best=math.nan, val_loss_final=None, test_loss=math.inf, train_seconds=0)
            run["curve"] = [{**point, "val_loss": math.nan} for point in run["curve"]]
        if case == "no evaluation":
            run["curve"] = []
        if case == "no routing":
            run["routing"] = None
        if case == "empty routing":
            run["routing"] = {"history": [], "layers": []}
        if case == "null routing" and run["routing"]:
            for layer in run["routing"]["layers"]:
                layer.update(utilization=math.nan, effective_atoms=math.nan, strength=None, gate=math.nan, load=[])
    page = Page(render_report(runs)).text
    assert ("no gate saturated" in page) is (case in {"one run", "all NaN", "no evaluation"})
    assert ("Health of the routing" in page) is (case not in {"no routing", "empty routing"})


def test_same_records_give_the_same_page_in_any_order(make_runs, usual_page):
    assert render_report(make_runs()[::-1]) == usual_page


def test_failed_write_leaves_the_old_report(make_runs, tmp_path, monkeypatch):
    path = write_report(make_runs(("dsc",)), tmp_path)
    before = path.read_text(encoding="utf-8")

    def fail(self, target):
        raise OSError("disk full")

    monkeypatch.setattr("pathlib.Path.replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_report(make_runs(("dense",)), tmp_path)
    assert path.read_text(encoding="utf-8") == before
    assert [file.name for file in tmp_path.iterdir()] == ["report.html"]


def test_no_runs_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="at least one run record"):
        write_report([], tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_config_splits_into_shared_and_varying(make_runs):
    runs = make_runs(("dense", "dsc"))
    runs[0]["config"], runs[1]["config"] = ({"a": {"b": 1}, "seed": seed, "width": 8} for seed in (1, 2))
    runs[2]["config"], runs[3]["config"] = ({"a": {"b": 1}, "seed": seed, "gate": None} for seed in (1, 2))
    same, varying = split_config(runs)
    assert same == [("a.b", "1")]
    assert dict(varying) == {
        "seed": {"dense": "1, 2", "dsc": "1, 2"},
        "width": {"dense": "8"},
        "gate": {"dsc": "null"},
    }
    assert flatten({"x": {"y": [1, "z"]}, "n": "text"}) == {"x.y": '[1, "z"]', "n": "text"}
