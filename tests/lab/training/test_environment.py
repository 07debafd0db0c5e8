"""What a record says about where it was made."""

import subprocess
import sys
import types

import pytest
import torch

from torchdsc.lab.training import environment
from torchdsc.lab.training.environment import (
    command_line,
    commit,
    hardware,
    peak_memory_bytes,
    provenance,
    reset_peak_memory,
    versions,
)


def git(folder, *arguments):
    identity = ("-c", "user.name=a", "-c", "user.email=a@b.c")
    done = subprocess.run(["git", *identity, *arguments], cwd=folder, capture_output=True, text=True, check=True)
    return done.stdout.strip()


class TestCommit:
    @pytest.fixture
    def package(self, tmp_path, monkeypatch):
        """A checkout that holds a package with this module in it."""
        package = tmp_path / "checkout" / "src" / "pkg"
        for file in ("__init__.py", "lab/training/environment.py", "nn/dsc.py"):
            (package / file).parent.mkdir(parents=True, exist_ok=True)
            (package / file).write_text("")
        monkeypatch.setattr(environment, "__file__", str(package / "lab" / "training" / "environment.py"))
        git(tmp_path / "checkout", "init")
        return package

    def test_of_a_checkout(self, package):
        git(package, "add", ".")
        git(package, "commit", "-m", "all")
        head = git(package, "rev-parse", "HEAD")
        assert commit() == head
        # A change beside the package is none of its source, one in another part of it is.
        (package.parents[1] / "notes.txt").write_text("changed")
        assert commit() == head
        (package / "nn" / "dsc.py").write_text("changed")
        assert commit() == f"{head}-dirty"

    def test_of_a_package_that_the_checkout_around_it_does_not_track(self, package):
        (package.parents[1] / "readme").write_text("")
        git(package.parents[1], "add", "readme")
        git(package.parents[1], "commit", "-m", "another project")
        assert commit() == "unknown"

    @pytest.mark.parametrize("lack", ["commits", "git", "a checkout"])
    def test_without(self, package, lack, tmp_path, monkeypatch):
        git(package, "add", ".")
        if lack == "git":
            git(package, "commit", "-m", "all")
            monkeypatch.setenv("PATH", "")
        if lack == "a checkout":
            monkeypatch.setattr(environment, "__file__", str(tmp_path / "pkg" / "lab" / "training" / "environment.py"))
            package.rename(tmp_path / "pkg")
        assert commit() == "unknown"


class TestPeakMemory:
    @pytest.mark.skipif(torch.cuda.is_available() or sys.platform != "linux", reason="counts the GPU's memory there")
    def test_grows_with_an_allocation_and_resets(self):
        megabyte = 2**20
        reset_peak_memory()
        before = peak_memory_bytes()
        # Small pieces, which the allocator keeps after they are freed.
        pieces = [torch.ones(16 * 1024) for _ in range(1024)]
        assert peak_memory_bytes() - before > 60 * megabyte
        del pieces
        assert peak_memory_bytes() - before > 60 * megabyte
        reset_peak_memory()
        assert peak_memory_bytes() - before < 20 * megabyte

    @pytest.mark.gpu
    @pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
    def test_on_a_gpu(self):
        reset_peak_memory()
        before = peak_memory_bytes()
        torch.ones(2**24, device="cuda")
        assert peak_memory_bytes() - before >= 2**26


class TestCommandLine:
    @pytest.mark.parametrize(
        ("argv", "parent", "expected"),
        [
            (["/usr/local/bin/torchdsc", "compare", "--seeds", "[1, 2]"], None, "torchdsc compare --seeds '[1, 2]'"),
            (["/x/torchdsc/cli/__main__.py", "compare"], "torchdsc.cli", "python -m torchdsc.cli compare"),
            (["script.py"], None, "script.py"),
        ],
    )
    def test_names_no_place(self, monkeypatch, argv, parent, expected):
        monkeypatch.setattr(sys, "argv", argv)
        main = types.ModuleType("__main__")
        main.__spec__ = parent and types.SimpleNamespace(parent=parent)
        monkeypatch.setitem(sys.modules, "__main__", main)
        assert command_line() == expected


def test_versions():
    found = versions()
    assert found["torch"] == torch.__version__
    assert {"python", "torchdsc", "transformers"} <= set(found)


def test_hardware():
    described = hardware()
    assert described["cpu"]
    assert described["threads"] == torch.get_num_threads()
    assert ("gpu" in described) == torch.cuda.is_available()


def test_provenance():
    assert provenance().keys() == {"versions", "hardware", "commit", "command"}
    assert provenance()["hardware"]["compiled"] in ("none", "_native", "_native_avx2", "_native_avx512")
