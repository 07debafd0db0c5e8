"""docs/experiments.md: its files are experiments, and its new task runs as a reader would run it."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from torchdsc.cli.main import main
from torchdsc.lab.experiment.config import Experiment
from torchdsc.lab.experiment.results import Results
from torchdsc.lab.schema import build

PAGE = (Path(__file__).parents[1] / "docs" / "experiments.md").read_text(encoding="utf-8")
FILES = dict(re.findall(r"```(?:yaml|python)\n# (\S+)\n(.*?)```", PAGE, re.DOTALL))


@pytest.fixture
def page(tmp_path, monkeypatch):
    """A folder with the page's files."""
    for name, content in FILES.items():
        (tmp_path / name).write_text(content)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", [name for name in FILES if name.endswith(".yaml")])
def test_files_are_experiments(page, name, capsys):
    assert len(FILES[name].splitlines()) <= 10
    assert main(["run", name, "--print_config"]) == 0
    assert build(Experiment, yaml.safe_load(capsys.readouterr().out)).title


def test_a_new_variant_runs(page, monkeypatch, capsys):
    monkeypatch.setenv("TORCHDSC_CACHE", str(page / "cache"))
    (page / "text.txt").write_text("".join(f"sentence {i} of a text to learn from.\n" for i in range(999)))
    flags = [
        "--corpus",
        "text.txt",
        "--tokenizer",
        "bytes",
        "--d_model",
        16,
        "--n_layer",
        1,
        "--n_head",
        2,
        "--window",
        16,
    ]
    flags += [
        "--total",
        20_000,
        "--active",
        12_000,
        "--match",
        "null",
        "--steps",
        2,
        "--warmup_steps",
        0,
        "--eval_every",
        1,
    ]
    assert main(["run", "mine.yaml", "--seeds", "1", *map(str, flags)]) == 0
    results = Results.read(page / "runs" / "mine")
    assert len(results.trials) == 4
    assert [run["config"]["feed_forward"] for run in results.runs] == [{}, {"activation": "relu"}]


def test_a_new_task_runs_as_told(page):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([".", os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-m", "torchdsc", "run", "waves.yaml", "--steps", "60"]
    done = subprocess.run(command, env=environment, cwd=page, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "DSC: 8 x 8, 64 atoms, K 4" in done.stdout
    sys.modules.pop("waves", None)
    results = Results.read(page / "runs" / "waves")
    assert [(run["variant"], run["steps"], len(run["curve"])) for run in results.runs[:4]] == [("Linear", 60, 2)] * 4
    assert (page / "runs" / "waves" / "report.html").is_file()
