"""What a run does around its trainer: an interrupted one ends as if nothing had happened."""

import errno
import json
import math
import time
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import TrainerCallback, TrainingArguments
from transformers.utils import logging as transformers_logging

from torchdsc.lab.training import runs, trainer
from torchdsc.lab.training.checkpoints import checkpoint_step
from torchdsc.models import DSCGPTForCausalLM

# What two equal runs need not share; somebody may commit between them.
VARYING = {"train_seconds", "peak_memory_bytes", "commit"}
SPARSE = {"router": "product_key", "router_rank": 8, "sparse_gradients": True, "frame_samples": 8}


class StopAt(TrainerCallback):
    """Interrupts at the beginning of the step after `step`: by Ctrl-C, or by asking the Trainer to end."""

    def __init__(self, step, *, politely=False):
        self.step, self.politely = step, politely

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step and not self.politely:
            raise KeyboardInterrupt

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step and self.politely:
            control.should_training_stop = True


def weights(folder):
    return load_file(folder / "model" / "model.safetensors")


def assert_same_run(folder, record, other):
    other_folder, other_record = other
    ours, theirs = weights(folder), weights(other_folder)
    assert ours.keys() == theirs.keys()
    for name, weight in ours.items():
        assert torch.equal(weight, theirs[name]), name
    assert {k: v for k, v in record.items() if k not in VARYING} == {
        k: v for k, v in other_record.items() if k not in VARYING
    }


class TestResume:
    @pytest.mark.parametrize(
        "changes",
        [
            {"method": "dense"},
            {"method": "moe"},
            {"method": "moe", "feed_forward": {"gated": True, "balancing": "bias"}},
            {"method": "peer", "feed_forward": {"query_norm": "batch"}},
            {"precision": "bf16"},
            {"feed_forward": SPARSE},
            {"optimizer": "muon"},
            {"optimizer": "muon", "feed_forward": SPARSE},
        ],
    )
    def test_between_checkpoints(self, train, tmp_path, changes):
        if "optimizer" in changes and not hasattr(torch.optim, "Muon"):
            pytest.skip("torch has no Muon")
        whole = tmp_path / "whole", train(tmp_path / "whole", **changes)
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path / "cut", StopAt(5), **changes)
        assert checkpoint_step(tmp_path / "cut") == 4
        assert_same_run(tmp_path / "cut", train(tmp_path / "cut", **changes), whole)

    def test_again_and_again(self, train, whole, tmp_path):
        for step in (1, 2, 3, 4):
            with pytest.raises(KeyboardInterrupt):
                train(tmp_path, StopAt(step))
        assert_same_run(tmp_path, train(tmp_path), whole("dsc"))

    def test_with_intervals_that_do_not_meet(self, train, tmp_path):
        """Logs every 2 steps, checkpoints every 25: the curve of training must not show where it stopped."""
        changes = {"eval_every": 25, "steps": 30, "method": "dense", "batch_size": 1}
        whole = tmp_path / "whole", train(tmp_path / "whole", **changes)
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path / "cut", StopAt(26), **changes)
        assert_same_run(tmp_path / "cut", train(tmp_path / "cut", **changes), whole)

    def test_stopped_by_a_callback(self, train, whole, tmp_path):
        with pytest.raises(KeyboardInterrupt, match="stopped at step 3 of 6"):
            train(tmp_path, StopAt(3, politely=True))
        assert not (tmp_path / "record.json").exists()
        assert_same_run(tmp_path, train(tmp_path), whole("dsc"))

    def test_damaged_checkpoint(self, train, whole, tmp_path, caplog):
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path, StopAt(5))
        file = tmp_path / "checkpoint-4" / "optimizer.pt"
        file.write_bytes(file.read_bytes()[:-20])
        assert_same_run(tmp_path, train(tmp_path), whole("dsc"))
        assert "checkpoint-4/optimizer.pt is damaged" in caplog.text

    @pytest.mark.parametrize("moment", ["evaluate", "save_pretrained", "write_json"])
    def test_killed_after_the_last_step(self, train, whole, tmp_path, monkeypatch, moment):
        """What the run saw before is recorded all the same, routing too."""

        def kill(*args, **kwargs):
            raise KeyboardInterrupt

        evaluate = trainer.LabTrainer.evaluate
        with monkeypatch.context() as patch:
            if moment == "evaluate":
                # Only the test evaluation names its data.
                patch.setattr(trainer.LabTrainer, moment, lambda *a, **k: kill() if a[1:] else evaluate(*a, **k))
            elif moment == "save_pretrained":
                save = DSCGPTForCausalLM.save_pretrained
                patch.setattr(
                    DSCGPTForCausalLM,
                    moment,
                    lambda self, place, **k: kill() if "checkpoint" not in str(place) else save(self, place, **k),
                )
            else:
                patch.setattr(runs, moment, kill)
            with pytest.raises(KeyboardInterrupt):
                train(tmp_path)
        assert checkpoint_step(tmp_path) == 6
        assert_same_run(tmp_path, train(tmp_path), whole("dsc"))

    def test_finished_run_is_not_trained_again(self, train, tmp_path, monkeypatch):
        record = train(tmp_path, method="dense", steps=2)
        # As after a kill between record and clean-up.
        (tmp_path / "checkpoint-2").mkdir()
        monkeypatch.setattr(trainer.LabTrainer, "train", lambda *args: pytest.fail("trained again"))
        assert train(tmp_path, method="dense", steps=2) == record
        assert not (tmp_path / "checkpoint-2").exists()


class TestFilesOfARun:
    def test_record_that_lacks_what_is_in_it(self, train, tmp_path):
        (tmp_path / "record.json").write_text("{}")
        with pytest.raises(ValueError, match=r"record.json is damaged: it lacks method, seed, .*; put it back"):
            train(tmp_path)

    def test_drafts_of_a_killed_process_are_removed(self, train, tmp_path):
        (tmp_path / ".model.abcd_123.tmp").mkdir()
        (tmp_path / ".model.abcd_123.tmp" / "config.json").write_text("{}")
        (tmp_path / ".record.json.abcd_123.tmp").write_text("{")
        train(tmp_path, method="dense", steps=1)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "record.json"]

    @pytest.mark.parametrize("place", ["checkpoint-2", "model"])
    @pytest.mark.parametrize("kind", [SafetensorError, RuntimeError, OSError])
    def test_full_disk(self, train, whole, tmp_path, monkeypatch, place, kind):
        """An error that names what could not be written; with room again, the run goes on."""
        error = {
            SafetensorError: SafetensorError("Error while serializing: I/O error: No space left on device"),
            RuntimeError: RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534"),
            OSError: OSError(errno.ENOSPC, "No space left on device"),
        }[kind]
        save = DSCGPTForCausalLM.save_pretrained

        def full(self, folder, **options):
            save(self, folder, **options)
            if Path(folder).name.lstrip(".").startswith(place):
                raise error

        with monkeypatch.context() as patch:
            patch.setattr(DSCGPTForCausalLM, "save_pretrained", full)
            with pytest.raises(OSError, match=rf"/{place} could not be written: "):
                train(tmp_path)
        assert not (tmp_path / "model").exists()
        assert_same_run(tmp_path, train(tmp_path), whole("dsc"))


class TestClockAndMemory:
    class Slow(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            time.sleep(0.1)

        def on_prediction_step(self, args, state, control, **kwargs):
            time.sleep(0.1)

    def test_seconds_are_those_of_training(self, train, tmp_path):
        start = time.perf_counter()
        record = train(tmp_path, self.Slow(), method="dense")
        wall = time.perf_counter() - start
        # Three evaluations and the test, of two batches each.
        assert 0.6 <= record["train_seconds"] <= wall - 0.8

    def test_seconds_go_on_after_an_interruption(self, train, tmp_path):
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path, StopAt(4), method="dense")
        file = tmp_path / "checkpoint-4" / "trainer_state.json"
        state = json.loads(file.read_text())
        for entry in state["log_history"]:
            entry["seconds"] += 1000
        file.write_text(json.dumps(state))
        start, before = time.perf_counter(), state["log_history"][-1]["seconds"]
        record = train(tmp_path, method="dense")
        assert before < record["train_seconds"] < before + time.perf_counter() - start

    def test_peak_memory_is_that_of_all_parts(self, train, tmp_path, monkeypatch):
        monkeypatch.setattr(trainer, "peak_memory_bytes", lambda: 10**15)
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path, StopAt(2), method="dense")
        monkeypatch.setattr(trainer, "peak_memory_bytes", lambda: 5)
        assert train(tmp_path, method="dense")["peak_memory_bytes"] == 10**15


class TestDivergence:
    def test_a_run_that_diverges_stops_and_says_so(self, train, tmp_path, caplog):
        seen = []

        class Steps(TrainerCallback):
            def on_step_begin(self, args, state, control, **kwargs):
                seen.append(state.global_step)

        record = train(tmp_path, Steps(), method="dense", learning_rate=1e30)
        # The first step of the warm-up has the rate 0, the second spoils the weights.
        assert (record["diverged_at_step"], seen) == (3, [0, 1, 2])
        assert record["train_curve"][-1]["step"] == 3
        assert not math.isfinite(record["train_curve"][-1]["loss"])
        assert all(math.isfinite(point["loss"]) for point in record["train_curve"][:-1])
        assert [point["step"] for point in record["curve"]] == [2, 4, 6]
        for key in ("val_loss_best", "val_loss_final", "test_loss"):
            assert math.isnan(record[key])
        assert "dense seed 1 diverged: the loss was nan at step 3 of 6" in caplog.text
        assert "Try a learning_rate below 1e+30" in caplog.text
        assert sorted(path.name for path in tmp_path.iterdir()) == ["record.json"]
        again = train(tmp_path, method="dense", learning_rate=1e30)
        assert json.dumps(again) == json.dumps(record)

    def test_a_run_that_diverges_in_its_last_step(self, train, tmp_path):
        record = train(tmp_path, method="dense", learning_rate=1e30, steps=2)
        assert record["diverged_at_step"] == 2
        assert math.isnan(record["val_loss_final"])
        assert not (tmp_path / "model").exists()


def test_messages_of_transformers_are_as_before(train, tmp_path):
    before = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    train(tmp_path, method="dense", steps=1)
    assert (transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()) == before


def test_window_longer_than_a_split(train, tmp_path):
    with pytest.raises(ValueError, match="at least one window of length 4000"):
        train(tmp_path / "some" / "run", window=4000, total=200_000, active=190_000, method="dense")
    # A run that came to nothing leaves nothing.
    assert list(tmp_path.iterdir()) == []


def test_several_processes_are_refused(train, tmp_path, monkeypatch):
    monkeypatch.setattr(TrainingArguments, "world_size", 2)
    with pytest.raises(ValueError, match="a run of the lab takes one process, got a launch of 2"):
        train(tmp_path)
