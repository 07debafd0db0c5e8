"""Tests before timings, and results that are whole or those of before."""

import json
import os
from pathlib import Path

import pytest

from benchmarks import command, page, runner
from benchmarks.case import Benchmark, Case
from benchmarks.ceilings import Ceilings
from benchmarks.command import Options

OLD = '{"old": true}\n'


@pytest.fixture
def bench(clock, monkeypatch, tmp_path):
    """Runs made-up benchmarks whose tests pass, into a folder that stands for the committed results."""
    registered = {}
    results = tmp_path / "results"
    monkeypatch.setattr(command, "load", registered.__getitem__)
    monkeypatch.setattr(command, "RESULTS", results)
    monkeypatch.setattr(command, "run_tests", lambda path: "failing" not in path)
    monkeypatch.setattr(command.torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(runner, "measure_ceilings", lambda device: Ceilings(1e9, 1e9))
    monkeypatch.setattr(runner, "extra_bytes", lambda call: None)

    def cases(settings):
        yield Case({"n": 1}, {"own": clock.call([0.001])}, subject="own")

    class Bench:
        def __init__(self):
            self.published, self.folder = [], results

        def add(self, name, *, tests=("tests/good",), cases=cases):
            registered[name] = Benchmark(name, "one thing", tests, cases, publish=self.published.append)

        def run(self, *names, **changes):
            command.run(Options(names=names, rounds=2, **changes))

        def old(self, name):
            results.mkdir(exist_ok=True)
            (results / name).write_text(OLD)
            return results / name

    return Bench()


def test_result_is_written(bench, capsys):
    bench.add("fake")
    bench.run("fake")
    result = json.loads((bench.folder / "fake.json").read_text())
    assert result["rows"][0]["calls"]["own"]["ms"]["median"] == 1.0
    out = capsys.readouterr().out
    assert "n 1   (ms; own / it)" in out
    assert out.endswith(f"written: {bench.folder / 'fake.json'}\n")


class TestTestsFirst:
    def test_a_benchmark_whose_tests_fail_is_not_timed(self, bench):
        def cases(settings):
            raise AssertionError("timed all the same")
            yield

        bench.add("bad", tests=("tests/good", "tests/failing"), cases=cases)
        bench.add("good")
        old = bench.old("bad.json")
        with pytest.raises(ChildProcessError, match=r"^not timed, because their tests fail: bad$"):
            bench.run("bad", "good")
        assert old.read_text() == OLD
        # The others are.
        assert (bench.folder / "good.json").is_file()

    def test_tests_run_once(self, bench, monkeypatch):
        ran = []
        monkeypatch.setattr(command, "run_tests", lambda path: ran.append(path) or True)
        bench.add("a", tests=("tests/x", "tests/y"))
        bench.add("b", tests=("tests/y", "tests/z"))
        bench.run("a", "b")
        assert ran == ["tests/x", "tests/y", "tests/z"]

    @pytest.mark.parametrize(("body", "passes"), [("assert True", True), ("assert False, 'because'", False)])
    def test_tests_are_those_of_pytest(self, tmp_path, capfd, body, passes):
        test = tmp_path / "test_it.py"
        test.write_text(f"def test_it():\n    {body}\n")
        assert command.run_tests(str(test)) is passes
        assert ("because" in capfd.readouterr().err) is not passes


class TestResultsAreWhole:
    @pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
    @pytest.mark.parametrize("when", ["building", "timing"])
    def test_whatever_ends_a_benchmark(self, bench, clock, error, when):
        def fail():
            raise error

        def cases(settings):
            yield Case({"n": 1}, {"own": clock.call([0.001])}, subject="own")
            if when == "building":
                fail()
            yield Case({"n": 2}, {"own": fail}, subject="own")

        bench.add("fake", cases=cases)
        old = bench.old("fake.json")
        with pytest.raises(error):
            bench.run("fake")
        assert old.read_text() == OLD
        assert list(bench.folder.iterdir()) == [old]
        assert bench.published == []

    def test_and_whatever_ends_its_writing(self, bench, monkeypatch):
        bench.add("fake")
        old = bench.old("fake.json")

        def fail(*arguments):
            raise OSError("disk full")

        monkeypatch.setattr(os, "replace", fail)
        monkeypatch.setattr(Path, "replace", fail)
        with pytest.raises(OSError, match="disk full"):
            bench.run("fake")
        assert old.read_text() == OLD
        assert list(bench.folder.iterdir()) == [old]


class TestWhere:
    def test_published_only_with_the_committed_results(self, bench, tmp_path, monkeypatch):
        bench.add("fake")
        monkeypatch.chdir(tmp_path)
        bench.run("fake", output=tmp_path / "elsewhere")
        bench.run("fake", quick=True)
        assert bench.published == []
        assert (tmp_path / "runs" / "bench-quick" / "fake.json").is_file()
        assert not bench.folder.exists()
        bench.run("fake")
        assert [result["benchmark"] for result in bench.published] == ["fake"]

    def test_comparison_stands_beside_the_result(self, bench, monkeypatch):
        def compare(name, ref, settings, **options):
            assert (name, ref, options["rounds"]) == ("fake", "v1", 2)
            return {"benchmark": name, "commit": "c" * 40, "base": {"ref": ref}, "rows": []}

        monkeypatch.setattr(command.base, "compare", compare)
        bench.add("fake")
        bench.run("fake", base="v1")
        assert [path.name for path in bench.folder.iterdir()] == ["compare-fake.json"]
        assert bench.published == []

    def test_results_of_a_gpu_have_their_own_file(self):
        assert command.result_name("layer", "cpu") == "layer.json"
        assert command.result_name("layer", "cuda") == "layer-cuda.json"


class TestPage:
    @pytest.fixture(autouse=True)
    def written(self, monkeypatch):
        written = []
        monkeypatch.setattr(page, "write", lambda results, docs: written.append(docs))
        return written

    def test_is_written(self, written):
        command.run(Options(names=["page"]))
        assert [docs.name for docs in written] == ["docs"]

    @pytest.mark.parametrize(
        ("options", "flags"),
        [
            ({"base": "HEAD"}, "--base"),
            ({"rounds": 5, "output": Path("out"), "quick": True}, "--rounds, --output, --quick"),
        ],
    )
    def test_stands_without_options(self, written, options, flags):
        with pytest.raises(ValueError, match=f"^page must stand without options, .* got {flags}$"):
            command.run(Options(names=["page"], **options))
        assert not written


def test_rounds():
    with pytest.raises(ValueError, match="rounds must be >= 2, got 1"):
        command.run(Options(names=["select"], rounds=1))
