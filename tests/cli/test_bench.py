"""``torchdsc bench`` finds the checkout's benchmarks, or says that it needs one."""

import sys
from types import SimpleNamespace

import pytest

from torchdsc.cli import bench


@pytest.fixture
def checkout(tmp_path):
    """A folder that looks like a checkout."""

    def make(name="torchdsc", folder=tmp_path / "checkout"):
        (folder / "benchmarks").mkdir(parents=True)
        (folder / "benchmarks" / "command.py").write_text("")
        (folder / "pyproject.toml").write_text(f'[project]\nname = "{name}"\n')
        return folder

    return make


class TestCheckout:
    def test_is_that_of_the_current_folder(self, checkout, monkeypatch):
        folder = checkout()
        (folder / "docs" / "figures").mkdir(parents=True)
        for place in (folder, folder / "docs" / "figures"):
            monkeypatch.chdir(place)
            assert bench.find_checkout() == folder

    def test_or_of_the_package(self, checkout, monkeypatch, workplace):
        folder = checkout()
        monkeypatch.setattr(bench, "__file__", str(folder / "src" / "torchdsc" / "cli" / "bench.py"))
        assert bench.find_checkout() == folder

    def test_or_there_is_none(self, fails, checkout, monkeypatch, workplace):
        monkeypatch.setattr(
            bench, "__file__", str(workplace / "lib" / "site-packages" / "torchdsc" / "cli" / "bench.py")
        )
        # Another project's benchmarks are not run.
        checkout("other", workplace / "other")
        monkeypatch.chdir(workplace / "other")
        with pytest.raises(FileNotFoundError):
            bench.find_checkout()
        line = "torchdsc bench: benchmarks need a checkout of torchdsc: run this command inside one"
        assert fails("bench") == fails("bench", "layer") == line


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], ([], None, None, None, False)),
        (["layer", "select", "--quick"], (["layer", "select"], None, None, None, True)),
        (["layer", "--rounds", "5", "--output", "out", "--base", "v1"], (["layer"], 5, "out", "v1", False)),
    ],
)
def test_options(torchdsc, monkeypatch, arguments, expected):
    seen = []
    options = SimpleNamespace(
        NAMES=["layer"], PAGE="page", check_name=lambda name: None, Options=lambda **given: given, run=seen.append
    )
    monkeypatch.setattr(bench, "import_module", lambda name: options)
    monkeypatch.setattr(sys, "path", [*sys.path])
    assert torchdsc("bench", *arguments).status == 0
    [given] = seen
    output = given["output"] and str(given["output"])
    assert (given["names"], given["rounds"], output, given["base"], given["quick"]) == expected


class TestHelp:
    def test_names_are_listed_and_not_required(self, torchdsc, monkeypatch):
        monkeypatch.setattr(sys, "path", [*sys.path])
        out = " ".join(torchdsc("bench", "--help").out.split())
        assert "names any of layer, layer_sweep, recommended, " in out
        assert "required" not in out

    def test_outside_a_checkout(self, torchdsc, monkeypatch, workplace):
        monkeypatch.setattr(
            bench, "__file__", str(workplace / "lib" / "site-packages" / "torchdsc" / "cli" / "bench.py")
        )
        assert "benchmarks, which a checkout lists here" in " ".join(torchdsc("bench", "--help").out.split())


class TestErrors:
    @pytest.fixture(autouse=True)
    def _path(self, monkeypatch):
        monkeypatch.setattr(sys, "path", [*sys.path])

    def test_unknown_name(self, fails):
        line = fails("bench", "layers")
        assert line.startswith("torchdsc bench: names must be among layer, ")
        assert line.endswith(", got 'layers'")

    def test_rounds(self, fails):
        assert fails("bench", "select", "--rounds", 1) == "torchdsc bench: rounds must be >= 2, got 1"
        assert fails("bench", "--rounds", "few").startswith("torchdsc bench: --rounds must be an integer, got 'few'")
