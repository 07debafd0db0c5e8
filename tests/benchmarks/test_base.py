"""The same benchmark against another commit's library."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import base, child
from torchdsc.lab.training import environment

ROOT = Path(__file__).resolve().parents[2]


def git(folder, *arguments):
    identity = ("-c", "user.name=a", "-c", "user.email=a@b.c")
    done = subprocess.run(["git", *identity, *arguments], cwd=folder, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def commit_all(folder, message):
    git(folder, "add", "--all")
    git(folder, "commit", "-m", message)
    return git(folder, "rev-parse", "HEAD")


@pytest.fixture
def repository(tmp_path):
    """A checkout with a library of one file; two commits."""
    folder = tmp_path / "checkout"
    package = folder / "src" / "torchdsc"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("SIDE = 'old'\n")
    git(folder, "init")
    first = commit_all(folder, "old")
    (package / "__init__.py").write_text("SIDE = 'new'\n")
    commit_all(folder, "new")
    return folder, first


def worktrees(folder):
    return git(folder, "worktree", "list", "--porcelain").count("worktree ")


class TestWorktree:
    def test_holds_the_commit_and_leaves_nothing(self, repository):
        folder, first = repository
        with base.worktree(folder, "HEAD~1") as (place, found):
            assert found == first
            assert (place / "src/torchdsc/__init__.py").read_text() == "SIDE = 'old'\n"
            assert worktrees(folder) == 2
        assert not place.parent.exists()
        assert worktrees(folder) == 1
        assert (folder / "src/torchdsc/__init__.py").read_text() == "SIDE = 'new'\n"

    @pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
    def test_leaves_nothing_after_an_error(self, repository, error):
        folder, _ = repository
        with pytest.raises(error), base.worktree(folder, "HEAD") as (place, _):
            raise error
        assert not place.parent.exists()
        assert worktrees(folder) == 1

    @pytest.mark.parametrize("ref", ["nowhere", "--help", "empty"])
    def test_of_no_commit_with_the_library(self, repository, ref):
        folder, _ = repository
        git(folder, "checkout", "--orphan", "empty")
        git(folder, "rm", "-r", "--force", ".")
        (folder / "readme").write_text("")
        commit_all(folder, "another project")
        with pytest.raises(ValueError, match=f"base must be a commit of .*that holds src/torchdsc, got '{ref}'"):
            base.worktree(folder, ref).__enter__()
        assert worktrees(folder) == 1


def side(*values, ended=None, missing=None):
    rows = [{"point": {"n": n}, "unit": "ms", "values": calls, "missing": missing or {}} for n, calls in values]
    return {"rows": rows, "ended": ended}


class TestMerge:
    def test_ratio_is_taken_turn_by_turn(self):
        turns = [
            {"current": side((1, {"a": own})), "base": side((1, {"a": other}))}
            for own, other in ((1.0, 10.0), (4.0, 5.0), (6.0, 20.0))
        ]
        [row] = base.merge(turns)
        ratio = {"q1": 0.2, "median": 0.3, "q3": 0.55}
        assert row["calls"] == {"a": {"current": 4.0, "base": 10.0, "current_over_base": ratio}}
        assert (row["point"], row["unit"], row["missing"]) == ({"n": 1}, "ms", {})

    def test_what_the_base_lacks(self):
        turn = {
            "current": side((1, {"published": 1.0, "new": 1.0, "dense": 2.0}), (2, {"dense": 2.0})),
            "base": side(
                (1, {"published": 2.0, "dense": 2.0}), ended="ImportError: x", missing={"new": "TypeError: y"}
            ),
        }
        first, second = base.merge([turn, turn])
        assert list(first["calls"]) == ["dense", "published"]
        assert first["missing"] == {"new": "TypeError: y"}
        assert (second["calls"], second["missing"]) == ({}, {"dense": "ImportError: x"})

    def test_points_that_differ_between_turns(self):
        both = {"current": side((1, {"a": 1.0})), "base": side((1, {"a": 2.0}))}
        neither = {"current": side((1, {"a": 1.0})), "base": side()}
        assert base.merge([both, neither, both])[0]["calls"]["a"]["current_over_base"]["median"] == 0.5
        assert base.merge([both, neither])[0]["missing"] == {"a": "not measured there"}


LIBRARY = """
import time

def work():
    time.sleep({seconds})
"""
SUITE = """
from benchmarks.case import Benchmark, Case
import torchdsc

NAMES = ("fake",)

def cases(settings):
    work = {"work": torchdsc.work, "new": lambda: torchdsc.new()}
    yield Case({"n": 1}, work, subject="work")
    # Missing as soon as it is named: nothing after it is known to the base.
    yield Case({"n": 2}, {"newer": torchdsc.newer}, subject="newer")

def load(name):
    assert name == "fake"
    return Benchmark(name, "work", (), cases)
"""
COMPARE = """
import json
from benchmarks import base, child
from torchdsc.lab.training import environment
from benchmarks.case import Settings
base.TURNS = 2
told = []
result = base.compare("fake", "HEAD", Settings(), rounds=2, command="c", progress=told.append)
print(json.dumps({"told": told, **result}))
"""


def test_compare(tmp_path):
    folder = tmp_path / "checkout"
    package = folder / "src" / "torchdsc"
    (package / "lab" / "training").mkdir(parents=True)
    (package / "__init__.py").write_text(LIBRARY.format(seconds=0.04))
    # The base has no instruments of its own: those of this side serve both.
    git(folder, "init")
    first = commit_all(folder, "old")
    for name in ("lab/__init__", "lab/training/__init__", "lab/training/latency", "lab/training/environment"):
        shutil.copy(ROOT / "src" / "torchdsc" / f"{name}.py", package / f"{name}.py")
    newer = "\ndef new():\n    pass\n\nnewer = new\n"
    (package / "__init__.py").write_text(LIBRARY.format(seconds=0.02) + newer)
    shutil.copytree(ROOT / "benchmarks", folder / "benchmarks", ignore=shutil.ignore_patterns("results", "__pycache__"))
    (folder / "benchmarks" / "suite" / "__init__.py").write_text(SUITE)
    done = subprocess.run(
        [sys.executable, "-c", COMPARE],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": f"{package.parent}{os.pathsep}{folder}"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["base"] == {"ref": "HEAD", "commit": first}
    first_row, second_row = result["rows"]
    assert 0.3 < first_row["calls"]["work"]["current_over_base"]["median"] < 0.8
    assert first_row["missing"] == {"new": "AttributeError: module 'torchdsc' has no attribute 'new'"}
    assert second_row["calls"] == {}
    assert "no attribute 'newer'" in second_row["missing"]["newer"]
    # Which side goes first alternates.
    assert [text.rpartition(" ")[2] for text in result["told"]] == ["base", "current", "current", "base"]
    assert worktrees(folder) == 1


class TestSourceCommit:
    @pytest.fixture
    def checkout(self, repository, monkeypatch):
        folder, head = repository
        (folder / "benchmarks" / "results").mkdir(parents=True)
        (folder / "benchmarks" / "case.py").write_text("")
        (folder / "benchmarks" / "results" / "a.json").write_text("{}")
        commit_all(folder, "benchmarks")
        monkeypatch.setattr(child, "ROOT", folder)
        monkeypatch.setattr(environment, "commit", lambda: head)
        return folder, head

    def test_says_that_benchmarks_differ(self, checkout):
        folder, head = checkout
        (folder / "benchmarks" / "results" / "a.json").write_text("{'new': 1}")
        (folder / "readme").write_text("new")
        assert child.source_commit() == head
        (folder / "benchmarks" / "case.py").write_text("new")
        assert child.source_commit() == f"{head}-dirty"

    @pytest.mark.parametrize("known", ["unknown", "0123-dirty"])
    def test_once(self, checkout, monkeypatch, known):
        folder, _ = checkout
        (folder / "benchmarks" / "case.py").write_text("new")
        monkeypatch.setattr(environment, "commit", lambda: known)
        assert child.source_commit() == known


@pytest.mark.parametrize("built", [True, False])
def test_the_base_gets_compiled_functions_where_this_side_has_them(tmp_path, built):
    sources = {side: tmp_path / side / "src" for side in ("current", "base")}
    for source in sources.values():
        (source / "torchdsc" / "ops").mkdir(parents=True)
    if built:
        (sources["current"] / "torchdsc" / "ops" / "_native_some.so").touch()
    (tmp_path / "base" / "setup.py").write_text("open('src/torchdsc/ops/_native.abi3.so', 'w').close()\n")
    assert base._same_native(**sources) == {"current": built, "base": built}
