"""examples/train_processes.py under torchrun: its losses are those of one process."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("accelerate")

SCRIPT = Path(__file__).parents[1] / "examples" / "train_processes.py"
# Thirteen are an epoch.
STEPS = ("--steps", "14")


def in_one_process(folder, *options):
    spec = importlib.util.spec_from_file_location("train_processes", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.main([str(folder), *STEPS, *options])
    return losses(folder)


def launched(folder, processes, *options, port):
    launcher = ["torch.distributed.run", "--master_port", str(port), "--nproc_per_node", str(processes)]
    command = [sys.executable, "-m", *launcher, str(SCRIPT), str(folder), *STEPS, *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    # Each process keeps the state of its random numbers.
    assert len(list((folder / "checkpoint-14").glob("rng_state_*.pth"))) == processes
    return losses(folder)


def losses(folder):
    return {int(step): loss for step, loss in json.loads((folder / "losses.json").read_text()).items()}


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """The losses of one process."""
    return in_one_process(tmp_path_factory.mktemp("one"))


@pytest.fixture(scope="module")
def four(tmp_path_factory):
    """A folder that four processes have written."""
    folder = tmp_path_factory.mktemp("four")
    launched(folder, 4, port=29611)
    return folder


@pytest.mark.slow
def test_four_processes_have_the_losses_of_one(one, four):
    assert losses(four) == pytest.approx(one, rel=1e-5)
    assert [*one] == [*range(1, 15)]
    assert one[14] < 0.95 * one[3]


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_others_go_on_from_what_four_have_saved(processes, one, four, tmp_path):
    interrupted = tmp_path / "interrupted"
    shutil.copytree(four / "checkpoint-7", interrupted / "checkpoint-7")
    options = ["--resume", str(interrupted)]
    folder = tmp_path / "later"
    found = in_one_process(folder, *options) if processes == 1 else launched(folder, processes, *options, port=29612)
    # The log before comes from the checkpoint.
    assert found == pytest.approx(one, rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "options", "tolerance"),
    [("adapted", ["--checkpointing"], 1e-5), ("converted", ["--bf16"], 5e-3)],
)
def test_adapted_and_converted_models(model, options, tolerance, tmp_path):
    expected = in_one_process(tmp_path / "one", "--model", model, *options)
    found = launched(tmp_path / "two", 2, "--model", model, *options, port=29613)
    assert found == pytest.approx(expected, rel=tolerance)
    assert len({*found.values()}) == 14


def test_nothing_to_go_on_from_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        in_one_process(tmp_path, "--resume", str(tmp_path))
    assert "--resume must be a folder with checkpoints" in capsys.readouterr().err


def test_a_batch_that_cannot_be_shared_is_refused(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(SystemExit):
        in_one_process(tmp_path)
    assert "--batch must be a multiple of the number of processes, 3, got 8" in capsys.readouterr().err
