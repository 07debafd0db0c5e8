"""One forecaster's run, and the task around it."""

import json
import math

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from torchdsc.lab.budget import METHODS
from torchdsc.lab.experiment.config import Experiment
from torchdsc.lab.experiment.runner import run as run_experiment
from torchdsc.lab.schema import build
from torchdsc.lab.tasks import load_task, settings_type
from torchdsc.lab.tasks.forecasting import run
from torchdsc.lab.tasks.forecasting.data import Data
from torchdsc.lab.tasks.forecasting.model import PatchForecaster
from torchdsc.lab.tasks.forecasting.settings import Settings
from torchdsc.lab.tasks.forecasting.task import Task
from torchdsc.lab.training import runs
from torchdsc.lab.training.checkpoints import checkpoint_step

# What two equal runs need not share; somebody may commit between them.
VARYING = {"train_seconds", "peak_memory_bytes", "commit"}


class StopAt(TrainerCallback):
    """Interrupts at the beginning of the step after `step`."""

    def __init__(self, step):
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


def errors(model, data, split, most=None):
    """Squared and absolute, by hand: window by window, from the series itself."""
    first = {"valid": data.ends[0], "test": data.ends[1]}[split]
    last = {"valid": data.ends[1], "test": data.ends[2]}[split] - data.horizon
    places = list(range(first, last + 1))
    if most is not None:
        places = [places[index * len(places) // most] for index in range(most)]
    differences = []
    for place in places:
        with torch.no_grad():
            forecast = model(data.values[place - data.look_back : place][None]).forecast[0]
        differences.append((forecast - data.values[place : place + data.horizon]).double().numpy())
    return np.mean(np.square(differences)), np.mean(np.abs(differences))


class TestRecord:
    @pytest.mark.parametrize("method", METHODS)
    def test_is_complete(self, whole, tiny, tiny_data, method):
        folder, record = whole(method)
        assert {*run._REQUIRED, *runs._REQUIRED} <= set(record)
        assert json.loads((folder / "record.json").read_text()) == record
        assert (record["method"], record["seed"], record["steps"]) == (method, 1, 6)
        assert record["config"] == {**tiny.model_dump(), "method": method}
        assert record["data"] == {tiny.source: tiny_data.sha256}
        assert record["scales"] == tiny_data.scales
        assert record["diverged_at_step"] is None
        assert (record["routing"] is None) == (method in ("dense", "gated"))
        assert sorted(path.name for path in folder.iterdir()) == ["model", "record.json"]

    @pytest.mark.parametrize("method", METHODS)
    def test_is_of_the_saved_model(self, whole, tiny_data, method):
        folder, record = whole(method)
        model = PatchForecaster.from_pretrained(folder / "model").eval()
        assert sum(p.numel() for p in model.parameters()) == record["params_total"]
        assert errors(model, tiny_data, "valid", 13) == pytest.approx(
            (record["val_mse_final"], record["val_mae_final"]), rel=1e-5
        )
        assert errors(model, tiny_data, "test") == pytest.approx((record["test_mse"], record["test_mae"]), rel=1e-5)

    def test_curves(self, whole):
        _, record = whole("dsc")
        assert [point["step"] for point in record["curve"]] == [2, 4, 6]
        assert record["val_mse_final"] == record["curve"][-1]["val_mse"]
        assert record["val_mse_best"] == min(point["val_mse"] for point in record["curve"])
        assert [point["step"] for point in record["train_curve"]] == [1, 2, 3, 4, 5, 6]
        # DSC's regularisers are in the loss alone.
        assert all(point["loss"] > point["task_loss"] > 0 for point in record["train_curve"])
        assert [point["step"] for point in record["routing"]["history"]] == [2, 4, 6]

    def test_accumulation_changes_the_losses_by_rounding_only(self, train, tmp_path):
        once, twice = (train(tmp_path / str(n), dropout=0.0, accumulation=n) for n in (1, 2))
        for curve, key in (("curve", "val_mse"), ("train_curve", "task_loss"), ("train_curve", "loss")):
            values = [[point[key] for point in record[curve]] for record in (once, twice)]
            assert values[0] == pytest.approx(values[1], rel=2e-3)

    def test_bfloat16_changes_the_errors_by_its_precision_only(self, train, whole, tmp_path):
        low, precise = train(tmp_path, precision="bf16"), whole("dsc")[1]
        assert low["val_mse_final"] != precise["val_mse_final"]
        assert low["val_mse_final"] == pytest.approx(precise["val_mse_final"], rel=0.02)


@pytest.mark.parametrize("method", METHODS)
def test_learns(train, tiny, tiny_data, tmp_path, method):
    """The waves are within reach of a few dozen steps; before the first, a forecast is about the look-back's mean."""
    settings = tiny.model_copy(update={"method": method})
    before, _ = errors(run.build_model(settings, run.make_plan(settings)).eval(), tiny_data, "valid")
    record = train(tmp_path, method=method, steps=60, eval_every=30, learning_rate=2e-2, dropout=0.0, batch_size=16)
    assert record["val_mse_final"] < 0.5 * before
    assert record["test_mse"] < 0.5 * before


class TestInterrupted:
    @pytest.mark.parametrize(
        "changes",
        [
            {"method": "dense"},
            {"method": "dsc"},
            {"method": "moe", "feed_forward": {"balancing": "bias"}},
            {"method": "peer", "feed_forward": {"query_norm": "batch"}},
            {"method": "mixture_of_loras", "precision": "bf16"},
        ],
    )
    def test_goes_on_as_if_nothing_had_happened(self, train, tmp_path, changes):
        whole = train(tmp_path / "whole", **changes)
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path / "cut", StopAt(5), **changes)
        assert checkpoint_step(tmp_path / "cut") == 4
        record = train(tmp_path / "cut", **changes)
        ours, theirs = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("cut", "whole"))
        assert ours.keys() == theirs.keys()
        for name, weight in ours.items():
            assert torch.equal(weight, theirs[name]), name
        assert {k: v for k, v in record.items() if k not in VARYING} == {
            k: v for k, v in whole.items() if k not in VARYING
        }

    def test_killed_while_the_test_part_is_looked_at(self, train, whole, tmp_path, monkeypatch):
        windows = Data.windows

        def kill(self, split, most=None):
            if split == "test":
                raise KeyboardInterrupt
            return windows(self, split, most)

        with monkeypatch.context() as patch:
            patch.setattr(Data, "windows", kill)
            with pytest.raises(KeyboardInterrupt):
                train(tmp_path)
        assert checkpoint_step(tmp_path) == 6
        record = train(tmp_path)
        _, other = whole("dsc")
        assert {k: v for k, v in record.items() if k not in VARYING} == {
            k: v for k, v in other.items() if k not in VARYING
        }


class TestTrial:
    def test_leaves_the_test_part_alone(self, train, tmp_path, monkeypatch):
        windows = Data.windows
        seen = []

        def note(self, split, most=None):
            seen.append(split)
            return windows(self, split, most)

        monkeypatch.setattr(Data, "windows", note)
        record = train(tmp_path, is_trial=True)
        assert set(seen) == {"valid"}
        assert (record["test_mse"], record["test_mae"]) == (None, None)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["record.json"]

    def test_that_diverges(self, train, tmp_path):
        wild = {"method": "dense", "learning_rate": 1e30}
        record = train(tmp_path / "trial", is_trial=True, **wild)
        assert record["test_mse"] is None
        assert math.isnan(record["val_mse_final"])
        assert [point["step"] for point in record["curve"]] == [2, 4, 6]
        record = train(tmp_path / "run", **wild)
        assert record["diverged_at_step"] is not None
        assert math.isnan(record["test_mse"])
        assert not (tmp_path / "run" / "model").exists()


class TestTask:
    def test_is_known(self):
        assert load_task("forecasting") is Task
        assert settings_type("forecasting") is Settings

    def test_describes(self, tiny):
        words = Task().describe(tiny.model_copy(update={"method": "dsc"}))
        assert words.startswith("M ")
        assert "K 4, static width" in words
        dense = Task().describe(tiny.model_copy(update={"method": "dense", "match": "moe"}))
        assert "is missed: " in dense
        assert "match = 'moe' gives the numbers" in dense

    def test_times_the_forward_pass(self, whole, tiny, tmp_path):
        folder, _ = whole("dsc")
        timed = Task().timed(tiny, folder)
        assert timed.batch == (8, 16, 3)
        assert timed.call().forecast.shape == (8, 4, 3)
        assert Task().timed(tiny, tmp_path) is None

    def test_seconds(self, tiny):
        longer = tiny.model_copy(update={"steps": 10_000})
        assert 0 < Task().seconds(tiny, is_trial=True) < Task().seconds(longer, is_trial=False)

    def test_an_experiment(self, tiny, tmp_path):
        variants = [
            {"name": "Dense", "settings": {"method": "dense"}, "trials": [{"learning_rate": 1e-9}, {}]},
            {"name": "DSC", "settings": {"method": "dsc"}},
        ]
        values = {"task": "forecasting", "settings": tiny.model_dump(), "variants": variants, "seeds": [1, 2]}
        results = run_experiment(build(Experiment, {**values, "timing_rounds": 2}), tmp_path / "runs")
        assert not results.failed
        table = (tmp_path / "runs" / "table.md").read_text()
        for words in ("validation MSE", "validation MAE", "test MSE", "test MAE", "Dense", "DSC"):
            assert words in table
        assert (tmp_path / "runs" / "report.html").is_file()
