"""The one rule of decision, and what is said of results by it."""

import copy
import math
from dataclasses import replace
from pathlib import Path

import pytest
from scipy import stats

from torchdsc.lab.experiment.findings import doubts, headline
from torchdsc.lab.experiment.intervals import (
    DASH,
    MINUS,
    Interval,
    format_interval,
    format_mean,
    mean_difference,
    median_ratio,
)
from torchdsc.lab.experiment.results import Results
from torchdsc.lab.experiment.summary import like_sized, summarize, verdict
from torchdsc.lab.experiment.tables import table
from torchdsc.lab.experiment.words import format_millions

EXPERIMENTS = Path(__file__).parents[3] / "experiments"


@pytest.fixture
def small():
    """Results of four variants with two seeds, free to be changed."""
    return copy.deepcopy(Results.read(EXPERIMENTS / "small"))


def set_losses(results, **losses):
    """Of variants by name without spaces, seed by seed."""
    for run in results.runs:
        run["val_loss_final"] = losses[run["method"]][[42, 1337].index(run["seed"])]
        run["val_loss_best"] = run["val_loss_final"]
    return results


def say(results):
    return " ".join(headline(results, summarize(results)))


def test_differences_are_paired_where_seeds_are_shared():
    own, other = {"": {0: 1.0, 1: 3.0, 2: 9.0}}, {"": {0: 2.0, 1: 3.5}}
    expected = stats.ttest_1samp([-1.0, -0.5], 0).confidence_interval()
    found = mean_difference(own, other)
    assert (found.mean, found.low, found.high) == pytest.approx((-0.75, *expected))


def test_differences_without_a_shared_seed_are_those_of_two_samples():
    own, other = [1.0, 2.0, 4.0], [3.0, 3.5]
    expected = stats.ttest_ind(own, other, equal_var=False).confidence_interval()
    found = mean_difference({"": dict(enumerate(own))}, {"": dict(enumerate(other, 10))})
    assert (found.low, found.high) == pytest.approx(tuple(expected))


def test_cases_are_taken_as_they_are():
    own = {"a": {0: 1.0, 1: 1.2}, "b": {0: 5.0, 1: 5.2}, "c": {0: 0.0}}
    found = mean_difference(own, {"a": {0: 1.0, 1: 1.0}, "b": {0: 4.0, 1: 4.0}})
    assert found.mean == pytest.approx(0.6)
    assert found.is_decided
    assert not mean_difference(own, {"c": {0: 1.0}}).is_decided
    assert math.isnan(mean_difference(own, {"d": {0: 1.0}}).mean)


def test_ratios_belong_together_round_by_round():
    assert median_ratio([2.0, 4.0, 6.0], [1.0, 2.0, 3.0]).mean == 2
    many = median_ratio([2.0 + index / 100 for index in range(20)], [1.0] * 20)
    assert many.low < many.mean < many.high


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ([1.0, 3.0], "2.00 ± 1.41"),
        ([-1.0], f"{MINUS}1.00"),
        ([1.0, math.nan, 3.0], "2.00 ± 1.41 (2 of 3 finite)"),
        ([math.nan], "NaN"),
        ([], DASH),
    ],
)
def test_means_in_words(values, text):
    assert format_mean(values, 2) == text


def test_figures_in_words():
    assert format_interval(Interval(-0.5, -0.75, -0.25), 2) == f"{MINUS}0.50 ± 0.25"
    assert [format_millions(size) for size in (35_012_345, 54_000, 0)] == ["35.01 M", "0.054 M", "0"]


@pytest.mark.parametrize(
    ("difference", "words"),
    [
        (Interval(math.nan), "diverged"),
        (Interval(-1.0), "one seed: not decided"),
        (Interval(-1.0, -3.0, 1.0), "not decided"),
        (Interval(-1.0, -1.5, -0.5), "lower: better"),
        (Interval(1.0, 0.5, 1.5), "higher: worse"),
    ],
)
def test_verdicts(small, difference, words):
    assert verdict(difference, small.task.measure) == words


def test_headline_names_a_winner_only_where_it_is_decided(small):
    clear = {"dense": (3.5, 3.6), "moe": (3.6, 3.7), "mixture_of_loras": (3.7, 3.8)}
    assert say(set_losses(small, dsc=(3.0, 3.1), **clear)).startswith(
        "DSC has the lowest validation loss of 4 variants"
    )
    assert say(set_losses(small, dsc=(3.0, 3.9), **clear)).startswith("No clear winner: DSC (3.450 ± 0.636), Dense")
    # One that diverged is no winner, however low its other run is.
    assert "No clear winner" in say(set_losses(small, dsc=(3.0, math.nan), **clear))
    assert say(replace(small, runs=[])) == "No trial reached a finite validation loss."


def test_variants_are_ranked_among_those_of_like_size_and_steps():
    results = Results.read(EXPERIMENTS / "length")
    groups = like_sized(summarize(results))
    assert [{run["steps"] for row in group for run in row.runs} for group in groups] == [{450}, {1800}]
    assert len(headline(results, summarize(results))) == 2


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"val_loss_final": math.nan}, "Training diverged: DSC, seed 42"),
        ({"val_loss_best": 4.0}, "DSC, seed 42 ends 0.440 past its best: it overfitted."),
        ({"steps": 1000}, "Compared variants differ in training steps: DSC and Dense"),
        ({"data": {"wikitext-2": "0"}}, "Compared variants differ in data"),
        ({"versions": {"torch": "1.0"}}, "Compared variants differ in software versions"),
        ({"params_total": 3_000_000}, "Compared variants are not of equal size: DSC and Dense"),
        ({"seed": 7}, "Not all runs are done: DSC."),
    ],
)
def test_doubts(small, changes, words):
    assert doubts(small, summarize(small)) == []
    next(run for run in small.runs if run["variant"] == "DSC").update(changes)
    assert any(words in doubt for doubt in doubts(small, summarize(small)))


def test_table_has_a_column_a_case_and_no_empty_ones(small):
    head, body = table(small, summarize(small))
    assert "bits per byte" not in head
    assert body[3][head.index("verdict")] == "not decided\nlower: better\nnot decided"
    results = Results.read(EXPERIMENTS / "glue")
    head, body = table(results, summarize(results))
    assert head[5:11] == ["SST-2", "CoLA", "MRPC", "RTE", "STS-B", "mean"]
    assert body[0][1] == "learning_rate 0.005"


def test_figures_below_zero_have_a_minus_sign():
    results = Results.read(EXPERIMENTS / "smollm2")
    head, body = table(results, summarize(results))
    row = next(cells for cells in body if cells[0] == "LoRA 8 with replay, 1e-3")
    assert row[head.index("forgotten")] == f"{MINUS}0.125"
