"""Summaries and tables, against values worked out by hand."""

from __future__ import annotations

import io
import math

import pytest
from rich.console import Console

from torchdsc.lab.summaries import Statistic, check_runs, leader, summarize
from torchdsc.lab.tables import DASH, TIMES, format_millions, print_table, to_markdown


def with_losses(runs, **losses):
    """Sets the three losses of each method's runs, in the order of seeds."""
    for method, values in losses.items():
        for run, value in zip([run for run in runs if run["method"] == method], values, strict=True):
            run.update(val_loss_best=value, val_loss_final=value, test_loss=value)
    return runs


def by_method(runs):
    return {summary.method: summary for summary in summarize(runs)}


def test_statistic_by_hand():
    # Mean 2, squared deviations 1 + 0 + 1 = 2, over n - 1 = 2: deviation 1 (the population one is 0.816).
    assert Statistic.over([1.0, 2.0, 3.0]) == Statistic(2.0, 1.0, 3)
    assert Statistic.over([5.0]) == Statistic(5.0, None, 1)
    assert Statistic.over([5.0, math.nan, None, math.inf]) == Statistic(5.0, None, 1)
    empty = Statistic.over([math.nan])
    assert math.isnan(empty.mean)
    assert (empty.std, empty.count) == (None, 0)


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        (Statistic(1.0, 0.1, 2), Statistic(1.3, 0.1, 2), False),
        (Statistic(1.0, 0.2, 2), Statistic(1.25, 0.1, 2), True),
        (Statistic(1.25, 0.1, 2), Statistic(1.0, 0.2, 2), True),
        (Statistic(1.0, None, 1), Statistic(9.0, 0.1, 2), True),
    ],
)
def test_overlap_of_intervals(first, second, expected):
    assert first.overlaps(second) is expected


def test_summary_by_hand(make_runs):
    runs = with_losses(make_runs(("dense", "dsc")), dense=(3.50, 3.52), dsc=(3.40, 3.44))
    for run, (median, q1, q3, seconds) in zip(
        runs, [(40, 39, 41, 100), (42, 41, 45, 300), (50, 48, 52, 200), (73, 70, 80, 200)], strict=True
    ):
        run["latency_ms"] = {"median": median, "q1": q1, "q3": q3, "batch": [16, 256]}
        run.update(train_seconds=seconds, tokens=1000)
    runs[0]["peak_memory_bytes"], runs[1]["peak_memory_bytes"] = 5, 7
    runs[2]["peak_memory_bytes"] = runs[3]["peak_memory_bytes"] = None

    dense, dsc = summarize(runs)

    assert (dense.label, dense.seeds, dense.num_seeds) == ("Dense", (42, 1337), 2)
    assert dense.val_best.mean == pytest.approx(3.51)
    assert dense.val_best.std == pytest.approx(0.02 / math.sqrt(2))  # Two values: |a - b| / sqrt(2).
    assert (dense.latency_ms, dense.latency_q1, dense.latency_q3) == (41, 40, 43)
    assert dense.latency_ratio == 1
    assert dsc.latency_ratio == pytest.approx(61.5 / 41)
    assert dense.tokens_per_second == pytest.approx(2000 / 400)
    assert (dense.peak_memory_bytes, dsc.peak_memory_bytes) == (7, None)
    assert (dsc.params_total, dsc.params_active) == (35_010_000, 28_000_000)
    assert dsc.loss("test") is dsc.test


def test_methods_come_in_the_paper_s_order_and_seeds_ascend(make_runs):
    runs = make_runs()[::-1]
    summaries = summarize(runs)
    assert [summary.method for summary in summaries] == ["dense", "moe", "mixture_of_loras", "dsc"]
    assert {summary.seeds for summary in summaries} == {(42, 1337)}


def test_without_dense_there_is_no_ratio(make_runs):
    (summary,) = summarize(make_runs(("dsc",)))
    assert summary.latency_ratio is None
    assert f"| {DASH} |" in to_markdown([summary])


def test_untimed_dense_gives_no_ratio(make_runs):
    runs = make_runs(("dense", "dsc"))
    for run in runs[:2]:
        run["latency_ms"] = {"median": math.nan, "q1": math.nan, "q3": math.nan}
    assert by_method(runs)["dsc"].latency_ratio is None


def test_one_seed_has_no_deviation(make_runs):
    summaries = summarize(make_runs(seeds=(7,)))
    assert all(summary.val_best.std is None for summary in summaries)
    assert "±" not in to_markdown(summaries)


def test_diverged_seed_is_left_out_and_counted(make_runs):
    runs = with_losses(make_runs(("dsc",)), dsc=(3.4, math.nan))
    text = to_markdown(summarize(runs))
    assert "3.400 (1 of 2 finite)" in text


def test_all_diverged_is_nan(make_runs):
    runs = with_losses(make_runs(("dsc",)), dsc=(math.nan, None))
    assert "| NaN | NaN | NaN |" in to_markdown(summarize(runs))


def test_diverged_runs_are_named(make_runs):
    runs = with_losses(make_runs(("dense", "dsc")), dense=(3.5, math.nan), dsc=(math.nan, 3.4))
    runs[1]["diverged_at_step"] = 1200
    runs[1]["train_seconds"] = 1e9
    runs[3]["diverged_at_step"] = None
    summaries = summarize(runs)
    assert summaries[0].tokens_per_second == pytest.approx(runs[0]["tokens"] / runs[0]["train_seconds"])
    console = Console(file=io.StringIO(), width=160)
    print_table(summaries, console)
    note = "Diverged, so that the loss is not finite: Dense seed 1337 (at step 1,200), DSC seed 42."
    for text in (to_markdown(summaries), console.file.getvalue()):
        assert note in text.splitlines()
    assert "Diverged" not in to_markdown(summarize(make_runs()))


def test_leader_needs_intervals_apart(make_runs):
    clear = with_losses(make_runs(("dense", "dsc")), dense=(3.50, 3.52), dsc=(3.40, 3.42))
    close = with_losses(make_runs(("dense", "dsc")), dense=(3.41, 3.44), dsc=(3.40, 3.42))
    assert leader(summarize(clear), "val_best").method == "dsc"
    assert leader(summarize(close), "val_best") is None


def test_leader_needs_every_rival_apart(make_runs):
    runs = with_losses(make_runs(("dense", "moe", "dsc")), dense=(3.1, 4.1), moe=(3.50, 3.51), dsc=(3.40, 3.41))
    assert leader(summarize(runs), "val_best") is None


def test_no_leader_with_one_seed_one_method_or_a_diverged_run(make_runs):
    assert leader(summarize(make_runs(seeds=(42,))), "val_best") is None
    assert leader(summarize(make_runs(("dsc",))), "val_best") is None
    runs = with_losses(make_runs(("dense", "dsc"), (1, 2, 3)), dense=(3.5, 3.5, 3.51), dsc=(3.40, 3.41, math.nan))
    assert leader(summarize(runs), "val_best") is None


def test_markdown_table(make_runs):
    runs = with_losses(make_runs(("dense", "dsc")), dense=(3.50, 3.52), dsc=(3.40, 3.42))
    for run in runs:
        run["latency_ms"] = {"median": 40.0 if run["method"] == "dense" else 51.2, "q1": 39.5, "q3": 52.0}
    lines = to_markdown(summarize(runs)).splitlines()
    assert lines[2] == (
        "| Dense | 35.00 M | 35.00 M | 3.510 ± 0.014 | 3.510 ± 0.014 | 3.510 ± 0.014 "
        f"| 40.00 (39.50{DASH}52.00) | 1.00{TIMES} | width 2611 |"
    )
    assert lines[3].startswith("| DSC | 35.01 M | 28.00 M | **3.410 ± 0.014** | **3.410 ± 0.014** |")
    assert lines[3].endswith(f"| 1.28{TIMES} | M 509, K 4, static width 106 |")
    assert {line.count("|") for line in lines[:4]} == {10}
    assert "sample standard deviation" in lines[-1]


def test_markdown_escapes_what_would_break_a_row(make_runs):
    runs = make_runs(("dsc",))
    for run in runs:
        run["description"] = "a|b\nc"
    assert to_markdown(summarize(runs)).splitlines()[2].endswith(r"| a\|b c |")


@pytest.mark.parametrize("width", [80, 160])
def test_printed_table_shows_every_number_whole(make_runs, width):
    runs = with_losses(make_runs(), dsc=(3.30, 3.32))
    runs[-1]["description"] = runs[-2]["description"] = "[bold]M 9[/bold]"
    console = Console(file=io.StringIO(), width=width, color_system=None)
    print_table(summarize(runs), console)
    text = console.file.getvalue()
    assert "…" not in text
    assert "3.310" in text
    assert "± 0.014" in text
    assert "Mixture-of-LoRAs" in text
    assert "DSC: [bold]M 9[/bold]" in text
    assert max(map(len, text.splitlines())) <= width


def test_printed_leader_is_bold(make_runs):
    console = Console(file=io.StringIO(), width=160, force_terminal=True, color_system="standard")
    print_table(summarize(with_losses(make_runs(), dsc=(3.30, 3.32))), console)
    assert "\x1b[1m3.310 ± 0.014\x1b[0m" in console.file.getvalue()


@pytest.mark.parametrize(
    ("count", "text"), [(35_011_234, "35.01 M"), (1_234_000_000, "1,234.00 M"), (54_321, "0.054 M"), (0, "0.00 M")]
)
def test_millions(count, text):
    assert format_millions(count) == text


def test_no_runs_is_an_error():
    with pytest.raises(ValueError, match="at least one run record"):
        summarize([])


@pytest.mark.parametrize("key", ["method", "val_loss_best", "latency_ms", "routing", "corpus"])
def test_missing_key_is_named(make_runs, key):
    runs = make_runs()
    del runs[3][key]
    with pytest.raises(ValueError, match=rf"runs\[3\] lacks {key}"):
        check_runs(runs)


def test_missing_quartile_is_named(make_runs):
    runs = make_runs()
    del runs[1]["latency_ms"]["q3"]
    with pytest.raises(ValueError, match=r"runs\[1\] lacks latency_ms\.q3"):
        check_runs(runs)


def test_unknown_method_repeated_run_and_mixed_sizes_are_errors(make_runs):
    runs = make_runs()
    with pytest.raises(ValueError, match="method must be one of dense, moe, mixture_of_loras, peer, dsc, got 'rnn'"):
        check_runs([*runs, {**runs[0], "method": "rnn"}])
    with pytest.raises(ValueError, match=r"runs\[8\] repeats method 'dense' with seed 42"):
        check_runs([*runs, runs[0]])
    runs[1]["params_active"] += 1
    with pytest.raises(ValueError, match="mean over different models"):
        check_runs(runs)
