"""What is recorded of a case: times, ratios, floors, memory."""

import json

import pytest
import torch

from benchmarks import ceilings, child, peak, runner
from benchmarks.case import Benchmark, Case, Floor, MemoryCase, Settings, ordered
from benchmarks.ceilings import Ceilings, measure_ceilings

MEGABYTE = 2**20
CEILINGS = Ceilings(copy_bytes_per_second=1e9, product_operations_per_second=1e10)


@pytest.fixture
def quiet(monkeypatch):
    """Rates given rather than measured, and no memory."""
    monkeypatch.setattr(runner, "measure_ceilings", lambda device: CEILINGS)
    monkeypatch.setattr(runner, "extra_bytes", lambda call: 5 * MEGABYTE)


def run(cases, **changes):
    benchmark = Benchmark("fake", "one thing against another", ("tests/fake",), cases)
    options = {"rounds": 3, "command": "torchdsc bench fake", "progress": lambda text: None, **changes}
    return runner.run(benchmark, options.pop("settings", Settings()), **options)


class TestOrder:
    def test_dense_and_the_floor_come_first_the_published_formulation_last(self):
        names = ["published", "dsc", "moe (eager)", "floor", "mixture_of_loras", "dense"]
        assert ordered(names) == ["dense", "floor", "dsc", "moe (eager)", "mixture_of_loras", "published"]

    @pytest.mark.usefixtures("quiet")
    def test_of_a_result(self, clock):
        names = ("published", "dsc", "floor", "dense")

        def cases(settings):
            yield Case({"n": 1}, {name: clock.call([0.001]) for name in names}, subject="dsc")

        assert list(run(cases)["rows"][0]["calls"]) == ["dense", "floor", "dsc", "published"]


@pytest.mark.usefixtures("quiet")
class TestTimes:
    def test_ratio_is_the_median_over_rounds_of_ratios(self, clock):
        # One trial, two warm-up rounds, three counted ones.
        own = clock.call([0.1, 0.1, 0.1, 0.001, 0.004, 0.006])
        other = clock.call([0.1, 0.1, 0.1, 0.010, 0.005, 0.020])

        def cases(settings):
            yield Case(
                {"tokens": 7, "kind": "forward"}, {"own": own, "other": other}, subject="own", per=2, unit="ms a"
            )

        [row] = run(cases)["rows"]
        assert row["point"] == {"tokens": 7, "kind": "forward"}
        assert (row["unit"], row["subject"], row["rounds"], row["left_out"]) == ("ms a", "own", 3, {})
        assert row["calls"]["own"]["ms"] == {"q1": 1.25, "median": 2.0, "q3": 2.5}
        assert row["calls"]["other"]["ms"] == {"q1": 3.75, "median": 5.0, "q3": 7.5}
        # Rounds give 0.1, 0.8 and 0.3; the medians' ratio would be 0.4.
        assert row["calls"]["other"]["subject_over_it"] == {"q1": 0.2, "median": 0.3, "q3": 0.55}
        assert row["calls"]["own"]["subject_over_it"]["median"] == 1.0
        assert row["calls"]["own"]["extra_bytes"] == 5 * MEGABYTE

    @pytest.mark.parametrize(("seconds", "expected"), [(0.1, 80), (1e-6, 200), (60, 7)])
    def test_as_many_rounds_as_there_is_time_for(self, clock, seconds, expected):
        def cases(settings):
            yield Case({}, {"own": clock.call([seconds])}, subject="own")

        assert run(cases, rounds=None)["rows"][0]["rounds"] == expected

    def test_quick(self, clock):
        def cases(settings):
            assert settings.quick
            yield Case({}, {"own": clock.call([0.001])}, subject="own")

        result = run(cases, rounds=None, settings=Settings(quick=True))
        assert result["quick"] is True
        assert result["rows"][0]["rounds"] == 3

    def test_a_case_may_depend_on_the_row_before(self, clock):
        def cases(settings):
            row = yield Case({"n": 1}, {"a": clock.call([0.001]), "b": clock.call([0.002])}, subject="a")
            seen = row["calls"]["b"]["subject_over_it"]["median"]
            yield Case({"n": 2, "seen": seen}, {"a": clock.call([0.001])}, subject="a")
            return {"summary": seen}

        result = run(cases)
        assert [row["point"] for row in result["rows"]] == [{"n": 1}, {"n": 2, "seen": 0.5}]
        assert result["summary"] == 0.5

    def test_floor(self, clock):
        def case(floor):
            def cases(settings):
                yield Case({}, {"own": clock.call([0.02])}, subject="own", floor=floor, per=4)

            return run(cases)["rows"][0]["floor"]

        # 2e6 bytes at 1e9 a second are 2 ms; 1e8 operations at 1e10 are 10 ms; the call takes 20 ms.
        assert case(Floor(2_000_000, 100_000_000)) == {
            **{"bytes": 2_000_000, "operations": 100_000_000, "copy_ms": 2.0, "product_ms": 10.0, "ms": 10.0},
            **{"achieved": 0.5, "per": 4},
        }
        assert case(Floor(8_000_000, 10))["ms"] == 8.0

    def test_what_a_result_says_about_itself(self, clock):
        def cases(settings):
            yield Case({"n": 1}, {"own": clock.call([0.001])}, subject="own", left_out={"big": "too big"})

        result = run(cases)
        assert result["rows"][0]["left_out"] == {"big": "too big"}
        assert (result["schema"], result["benchmark"], result["command"]) == (1, "fake", "torchdsc bench fake")
        assert result["hardware"]["threads"] == torch.get_num_threads()
        assert {"python", "torch", "torchdsc"} <= set(result["versions"])
        assert result["ceilings"] == CEILINGS.as_dict()
        assert {"date", "commit", "device", "rounds", "description"} <= set(result)
        assert json.loads(json.dumps(result)) == result


class TestMemory:
    def test_of_steps_in_fresh_processes(self, monkeypatch):
        taken = {"m:own": iter((30, 20, 90)), "m:published": iter((120, 130, 100))}
        asked = []

        def call(step, point):
            asked.append((step, point))
            return next(taken[step])

        monkeypatch.setattr(child, "call", call)
        monkeypatch.setattr(runner, "measure_ceilings", lambda device: CEILINGS)

        def cases(settings):
            steps = {"published": "m:published", "own": "m:own"}
            yield MemoryCase({"T": 3}, steps, subject="own", computed={"published": {"rows": 90, "matrix": 20}})

        [row] = run(cases)["rows"]
        # In turn, and the median of the processes counts.
        assert asked == [("m:own", {"T": 3}), ("m:published", {"T": 3})] * 3
        assert row["calls"] == {
            "own": {"bytes": 30, "runs": [30, 20, 90], "subject_over_it": 1.0},
            "published": {"bytes": 120, "runs": [120, 130, 100], "subject_over_it": 0.25},
        }
        assert row["computed"] == {"published": {"bytes": 110, "terms": {"rows": 90, "matrix": 20}}}

    @pytest.mark.skipif(not peak._can_set_back(), reason="this system does not tell")
    def test_extra_bytes_are_those_beyond_what_was_there(self):
        before = torch.ones(8 * MEGABYTE)

        def call():
            kept = torch.ones(16 * MEGABYTE)
            (kept + before.sum()).sum()
            return kept

        # 64 MiB kept and as many passing; the 32 MiB from before do not count, and nothing is left for a second call.
        for _ in range(2):
            assert 120 * MEGABYTE < peak.extra_bytes(call) < 140 * MEGABYTE
        assert peak.extra_bytes(lambda: None) < 4 * MEGABYTE

    def test_is_unknown_where_the_mark_cannot_be_set_back(self, monkeypatch):
        if torch.cuda.is_available():
            pytest.skip("counted by the allocator there")
        monkeypatch.setattr(peak, "_can_set_back", lambda: False)
        assert peak.extra_bytes(lambda: None) is None


class TestCeilings:
    def test_rates_of_the_fastest_round(self, clock, monkeypatch):
        def in_turn(functions, *, rounds, warmup):
            for function in functions.values():
                function()
            samples = {"copy": [4.0, 2.0, 3.0], "product": [1.0, 0.5, 2.0]}
            return {name: type("Timing", (), {"samples": samples[name]}) for name in functions}

        monkeypatch.setattr(ceilings, "measure_in_turn", in_turn)
        rates = measure_ceilings("cpu", copy_bytes=4096, product_size=16)
        # Read and written in 2 ms; 2 n^3 operations in 0.5 ms.
        assert rates.copy_bytes_per_second == 2 * 4096 / 0.002
        assert rates.product_operations_per_second == 2 * 16**3 / 0.0005

    def test_measured(self):
        rates = measure_ceilings("cpu", copy_bytes=1 << 20, product_size=128, rounds=2)
        assert rates.copy_bytes_per_second > 1e7
        assert rates.product_operations_per_second > 1e7


class TestChild:
    def test_answers_from_the_same_library(self):
        import torchdsc

        answer = child.call("tests.benchmarks.answers:where", {"number": 3})
        assert answer == {"number": 3, "torchdsc": torchdsc.__file__}

    def test_says_why_it_failed(self):
        with pytest.raises(child.ChildError, match=r"ended with status 1:[\s\S]*no such number"):
            child.call("tests.benchmarks.answers:fail", {})
