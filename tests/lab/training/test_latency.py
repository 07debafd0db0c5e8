"""Latency measured in turn."""

import pytest

from torchdsc.lab.training import latency
from torchdsc.lab.training.latency import measure_in_turn


def test_functions_take_turns():
    calls = []
    timings = measure_in_turn({name: lambda name=name: calls.append(name) for name in "abc"}, rounds=3, warmup=2)
    assert calls == list("abc") * 5
    assert list(timings) == list("abc")
    assert all(len(timing.samples) == 3 for timing in timings.values())


def test_median_and_quartiles_in_milliseconds(monkeypatch):
    now = 0.0
    durations = iter([1.0, 0.001, 0.005, 0.002, 0.004, 0.003])

    def work():
        nonlocal now
        now += next(durations)

    monkeypatch.setattr(latency.time, "perf_counter", lambda: now)
    timing = measure_in_turn({"work": work}, rounds=5, warmup=1)["work"]
    assert timing.samples == pytest.approx([1, 5, 2, 4, 3])
    assert (timing.q1, timing.median, timing.q3) == pytest.approx((2, 3, 4))


@pytest.mark.parametrize("rounds", [1, 0])
def test_rounds(rounds):
    with pytest.raises(ValueError, match=f"rounds must be >= 2, got {rounds}"):
        measure_in_turn({}, rounds=rounds)
