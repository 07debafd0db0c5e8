"""One run: what it records, and that an interrupted one ends as if nothing had happened."""

import dataclasses
import errno
import functools
import json
import math
import re
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch.nn import functional
from transformers import TrainerCallback, TrainingArguments, pipeline
from transformers.utils import logging as transformers_logging

from torchdsc.lab import checkpoints, training
from torchdsc.lab import trainer as lab_trainer
from torchdsc.lab.budget import METHODS
from torchdsc.lab.checkpoints import checkpoint_step
from torchdsc.lab.generation import generate
from torchdsc.lab.summaries import REQUIRED_KEYS
from torchdsc.lab.tokens import FixedWindows
from torchdsc.lab.training import build_model, make_plans, train_run
from torchdsc.models import DSCGPTForCausalLM
from torchdsc.optim import DenseAndSparseAdam, clip_grad_norm, parameter_groups

# What two equal runs need not share; somebody may commit between them.
VARYING = {"train_seconds", "peak_memory_bytes", "commit"}


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


@pytest.fixture
def train(tiny, tiny_data):
    """Trains in a folder: returns the record."""

    def run(folder, *callbacks, method="dsc", **changes):
        config = dataclasses.replace(tiny, **changes)
        plan = make_plans(config, tiny_data.vocab_size)[method]
        return train_run(config, plan, 1, tiny_data, folder, callbacks=list(callbacks))

    return run


@pytest.fixture(scope="module")
def whole(tiny, tiny_data, tmp_path_factory):
    """Runs that went through: method to folder and record."""

    @functools.cache
    def run(method):
        folder = tmp_path_factory.mktemp(method)
        plan = make_plans(dataclasses.replace(tiny, methods=[method]), tiny_data.vocab_size)[method]
        return folder, train_run(tiny, plan, 1, tiny_data, folder)

    return run


def test_checkpoints_that_another_process_removes(tmp_path, monkeypatch):
    gone, here = tmp_path / "checkpoint-1", tmp_path / "checkpoint-2"
    here.mkdir()
    monkeypatch.setattr(checkpoints, "_checkpoints", lambda folder: [gone, here])
    checkpoints.remove_checkpoints(tmp_path)
    assert not here.exists()


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


class TestParameterGroups:
    @pytest.mark.parametrize("method", METHODS)
    def test_every_parameter_is_in_its_group(self, tiny, method):
        options = {"input_context": 2}
        if method != "dense":
            options |= {"router_input": "embeddings", "router_context": 2, "router_norm": "layer_affine"}
        config = dataclasses.replace(tiny, methods=[method], overrides={method: {"feed_forward": options}})
        model = build_model(config, make_plans(config, 320)[method], 320)
        groups = parameter_groups(
            model, learning_rate=1e-3, weight_decay=0.02, router_lr_multiplier=5, atom_lr_multiplier=0.5
        )
        found = [(id(p), group["lr"], group["weight_decay"]) for group in groups for p in group["params"]]
        assert len(found) == len({i for i, _, _ in found}) == len(list(model.parameters()))
        settings = {i: (lr, decay) for i, lr, decay in found}
        for name, parameter in model.named_parameters():
            if "router." in name:
                expected = (5e-3, 0.0)
            elif any(part in name for part in ("embed", "norm", "gamma", "context")):
                expected = (1e-3, 0.0)
            elif "bank" in name:
                expected = (5e-4, 0.02)
            else:
                expected = (1e-3, 0.02)
            assert settings[id(parameter)] == expected, name

    def test_frozen_parameters_are_left_out(self, tiny):
        model = build_model(tiny, make_plans(tiny, 320)["dsc"], 320)
        model.model.embed_tokens.weight.requires_grad_(False)
        groups = parameter_groups(model, learning_rate=1e-3, weight_decay=0.02)
        assert sum(len(group["params"]) for group in groups) == len(list(model.parameters())) - 1

    @pytest.mark.parametrize("value", [0, -1, math.nan])
    def test_multiplier(self, value):
        for name in ("router_lr_multiplier", "atom_lr_multiplier"):
            with pytest.raises(ValueError, match=f"{name} must be finite and > 0"):
                parameter_groups(torch.nn.Linear(1, 1), learning_rate=1, weight_decay=0, **{name: value})

    def test_routers_keep_their_rate_throughout(self, train, tmp_path):
        """The published run's multiplier was lost after its first step."""
        seen = []

        class Rates(TrainerCallback):
            def on_step_begin(self, args, state, control, model, optimizer, **kwargs):
                routers = {id(p) for name, p in model.named_parameters() if "router" in name}
                seen.append(
                    {
                        id(group["params"][0]) in routers: (group["lr"], group["weight_decay"])
                        for group in optimizer.param_groups
                    }
                )

        train(tmp_path, Rates(), router_lr_multiplier=5.0)
        assert [rates[True][1] for rates in seen] == [0.0] * 6
        assert [rates[True][0] for rates in seen] == pytest.approx([5 * rates[False][0] for rates in seen])
        assert len({rates[False][0] for rates in seen}) == 6, "the rate moves"
        assert max(rates[False][0] for rates in seen) == pytest.approx(4e-3)


class TestRecord:
    @pytest.mark.parametrize("method", METHODS)
    def test_is_complete(self, whole, tiny, method):
        folder, record = whole(method)
        assert set(REQUIRED_KEYS) - set(record) == {"latency_ms"}
        assert json.loads((folder / "record.json").read_text()) == record
        assert (record["method"], record["seed"], record["steps"]) == (method, 1, 6)
        assert record["tokens"] == 6 * 4 * 16
        assert record["config"].items() > tiny.as_dict().items()
        assert (record["routing"] is None) == (method == "dense")
        assert not list(folder.glob("checkpoint-*"))

    @pytest.mark.parametrize("method", METHODS)
    def test_counts_are_the_saved_models(self, whole, method):
        folder, record = whole(method)
        model = DSCGPTForCausalLM.from_pretrained(folder / "model")
        assert sum(p.numel() for p in model.parameters()) == record["params_total"]

    @pytest.mark.parametrize("method", ["dense", "dsc"])
    def test_losses_are_the_saved_models(self, whole, tiny_data, method):
        folder, record = whole(method)
        model = DSCGPTForCausalLM.from_pretrained(folder / "model").eval()
        for split, expected in (("valid", record["val_loss_final"]), ("test", record["test_loss"])):
            losses = []
            for window in FixedWindows(getattr(tiny_data.tokens, split), 16, 8):
                with torch.no_grad():
                    logits = model(window["input_ids"].unsqueeze(0)).logits[0]
                losses.append(float(functional.cross_entropy(logits, window["shift_labels"])))
            assert np.mean(losses) == pytest.approx(expected, rel=1e-5)

    def test_curves(self, whole):
        _, record = whole("dsc")
        assert [(point["step"], point["tokens"]) for point in record["curve"]] == [(2, 128), (4, 256), (6, 384)]
        assert record["val_loss_final"] == record["curve"][-1]["val_loss"]
        assert record["val_loss_best"] == min(point["val_loss"] for point in record["curve"])
        assert [point["step"] for point in record["train_curve"]] == [1, 2, 3, 4, 5, 6]
        # DSC's regularisers are in the loss alone.
        assert all(point["loss"] > point["task_loss"] > 4 for point in record["train_curve"])
        assert [point["step"] for point in record["routing"]["history"]] == [2, 4, 6]

    def test_last_step_is_evaluated_though_eval_every_does_not_divide_it(self, train, tmp_path):
        record = train(tmp_path, steps=5)
        assert [point["step"] for point in record["curve"]] == [2, 4, 5]
        assert record["train_curve"][-1]["step"] == 5

    def test_accumulation_changes_the_losses_by_rounding_only(self, train, tmp_path):
        once, twice = (train(tmp_path / str(n), dropout=0.0, accumulation=n) for n in (1, 2))
        for curve, key in (("curve", "val_loss"), ("train_curve", "task_loss")):
            values = [[point[key] for point in record[curve]] for record in (once, twice)]
            assert values[0] == pytest.approx(values[1], rel=2e-3)
        assert twice["tokens"] == once["tokens"]

    def test_bfloat16_changes_the_losses_by_its_precision_only(self, train, whole, tmp_path):
        low, precise = train(tmp_path, precision="bf16"), whole("dsc")[1]
        assert low["val_loss_final"] != precise["val_loss_final"]
        assert low["val_loss_final"] == pytest.approx(precise["val_loss_final"], abs=0.02)
        assert {p.dtype for p in DSCGPTForCausalLM.from_pretrained(tmp_path / "model").parameters()} == {torch.float32}

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

    def test_a_trial_that_diverges_has_no_test_loss(self, tiny, tiny_data, tmp_path):
        config = dataclasses.replace(tiny, learning_rate=1e30)
        plan = make_plans(config, tiny_data.vocab_size)["dense"]
        assert train_run(config, plan, 1, tiny_data, tmp_path, is_trial=True)["test_loss"] is None

    def test_one_that_does_not_is_none(self, whole):
        assert whole("dense")[1]["diverged_at_step"] is None


SPARSE = {"router": "product_key", "router_rank": 8, "sparse_gradients": True, "frame_samples": 8}


class TestSparseBanks:
    """Banks with row-sparse gradients through Trainer: their optimizer, clipping, checkpoints."""

    def changes(self, **options):
        return {"overrides": {"dsc": {"feed_forward": SPARSE | options}}}

    def test_resume(self, train, tmp_path):
        whole = tmp_path / "whole", train(tmp_path / "whole", **self.changes())
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path / "cut", StopAt(5), **self.changes())
        assert_same_run(tmp_path / "cut", train(tmp_path / "cut", **self.changes()), whole)

    def test_first_step_is_that_of_dense_gradients(self, train, tmp_path):
        """Adam's first step leaves rows without a gradient alone, so that the two must agree."""
        settings = {"dropout": 0.0, "weight_decay": 0.0, "steps": 1, "warmup_steps": 0, "eval_every": 1}
        trained = []
        for sparse in (True, False):
            folder = tmp_path / str(sparse)
            options = self.changes(sparse_gradients=sparse, frame_weight=0.0)
            train(folder, **settings, **options)
            trained.append(weights(folder))
        for name, weight in trained[0].items():
            # SparseAdam adds eps before the bias correction, AdamW after it: small gradients make shorter steps.
            slack = 4e-3 if "bank" in name else 1e-8
            torch.testing.assert_close(weight, trained[1][name], rtol=1e-5, atol=slack, msg=name)
            if "bank" in name:
                same = (weight - trained[1][name]).abs() < 1e-3
                assert same.double().mean() > 0.9

    def test_norm_of_both_kinds(self):
        model = torch.nn.ModuleList([torch.nn.Embedding(9, 3, sparse=True), torch.nn.Embedding(9, 3)])
        model[1].load_state_dict(model[0].state_dict())
        # Rows 2 and 2: the norm is that of their sum.
        for embedding in model:
            (embedding(torch.tensor([2, 2, 5])) * torch.tensor([[1.0], [2.0], [7.0]])).sum().backward()
        both = torch.nn.utils.clip_grad_norm_([model[1].weight], 1e9)
        norm = clip_grad_norm([model[0].weight, torch.nn.Parameter(torch.zeros(2))], 0.5)
        torch.testing.assert_close(norm, both)
        clipped = model[0].weight.grad.to_dense()
        torch.testing.assert_close(clipped, model[1].weight.grad * 0.5 / norm)

    def test_step_refuses_a_closure(self):
        model = torch.nn.ModuleList([torch.nn.Embedding(3, 2, sparse=True), torch.nn.Linear(2, 2)])
        groups = [{"params": list(module.parameters()), "lr": 0.1} for module in model]
        with pytest.raises(ValueError, match="closure must be None"):
            DenseAndSparseAdam(groups[1:], groups[:1]).step(lambda: 0.0)


class TestResume:
    @pytest.mark.parametrize("method", ["dense", "moe", "dsc"])
    def test_between_checkpoints(self, train, whole, tmp_path, method):
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path, StopAt(5), method=method)
        assert checkpoint_step(tmp_path) == 4
        assert_same_run(tmp_path, train(tmp_path, method=method), whole(method))

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

    @pytest.mark.parametrize("damage", ["missing", "cut off"])
    def test_incomplete_checkpoint_is_passed_over(self, train, whole, tmp_path, damage):
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path, StopAt(5))
        state = tmp_path / "checkpoint-4" / "trainer_state.json"
        if damage == "missing":
            state.unlink()
            (tmp_path / "checkpoint-4" / "model.safetensors").unlink()
        else:
            state.write_bytes(state.read_bytes()[:-20])
        (tmp_path / "checkpoint-notes").mkdir()
        assert checkpoint_step(tmp_path) == 2
        assert_same_run(tmp_path, train(tmp_path), whole("dsc"))

    PARTS = ("model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json")

    @pytest.mark.parametrize("damage", ["cut off", "empty", "other bytes", "missing"])
    @pytest.mark.parametrize("part", PARTS)
    def test_damaged_checkpoint(self, train, whole, tmp_path, caplog, part, damage):
        """A run goes on from the one before, and says why."""
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path, StopAt(5))
        self.harm(tmp_path / "checkpoint-4" / part, damage)
        assert checkpoint_step(tmp_path) == 2
        assert_same_run(tmp_path, train(tmp_path), whole("dsc"))
        # Without its state a checkpoint is one that a kill cut off.
        told = re.findall("checkpoint-4(?:/\\S+ is damaged| lacks \\S+)", caplog.text)
        assert len(told) == (0 if (part, damage) == ("trainer_state.json", "missing") else 1)
        assert all(part.split(".")[-1] in text for text in told)

    @pytest.mark.parametrize("part", PARTS[:4])
    def test_no_checkpoint_before_the_damaged_one(self, train, tmp_path, part):
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path, StopAt(3), method="dense")
        self.harm(tmp_path / "checkpoint-2" / part, "cut off")
        message = (
            rf"checkpoint-2/{part} is damaged \(.*\), and no checkpoint before it is whole: delete .* to begin anew"
        )
        with pytest.raises(ValueError, match=message):
            train(tmp_path, method="dense")

    @staticmethod
    def harm(file, damage):
        content = file.read_bytes()
        middle = len(content) // 2
        if damage == "missing":
            file.unlink()
        elif damage == "other bytes":
            # In the header of safetensors; what its tensors hold has no checksum.
            file.write_bytes(bytes(8) + content[8:middle] + bytes(64) + content[middle + 64 :])
        else:
            file.write_bytes(content[:middle] if damage == "cut off" else b"")

    @pytest.mark.parametrize("moment", ["evaluate", "save_pretrained", "write_json"])
    def test_killed_after_the_last_step(self, train, whole, tmp_path, monkeypatch, moment):
        """What the run saw before is recorded all the same, routing too."""

        def kill(*args, **kwargs):
            raise KeyboardInterrupt

        evaluate = lab_trainer.LabTrainer.evaluate
        with monkeypatch.context() as patch:
            if moment == "evaluate":
                # Only the test evaluation names its data.
                patch.setattr(lab_trainer.LabTrainer, moment, lambda *a, **k: kill() if a[1:] else evaluate(*a, **k))
            elif moment == "save_pretrained":
                save = DSCGPTForCausalLM.save_pretrained
                patch.setattr(
                    DSCGPTForCausalLM,
                    moment,
                    lambda self, place, **k: kill() if "checkpoint" not in str(place) else save(self, place, **k),
                )
            else:
                patch.setattr(training, moment, kill)
            with pytest.raises(KeyboardInterrupt):
                train(tmp_path)
        assert checkpoint_step(tmp_path) == 6
        assert_same_run(tmp_path, train(tmp_path), whole("dsc"))

    def test_finished_run_is_not_trained_again(self, train, tmp_path, monkeypatch):
        record = train(tmp_path, method="dense", steps=2)
        # As after a kill between record and clean-up.
        (tmp_path / "checkpoint-2").mkdir()
        monkeypatch.setattr(training, "_train", lambda *args: pytest.fail("trained again"))
        assert train(tmp_path, method="dense", steps=2) == record
        assert not (tmp_path / "checkpoint-2").exists()


class TestFilesOfARun:
    def test_record_that_lacks_what_is_in_it(self, train, tmp_path):
        (tmp_path / "record.json").write_text("{}")
        with pytest.raises(ValueError, match=r"record.json is damaged: it lacks method, seed, .*; delete it"):
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

    def test_model_of_a_killed_run_is_replaced(self, train, tmp_path):
        (tmp_path / "model").mkdir()
        (tmp_path / "model" / "model.safetensors").write_bytes(b"half")
        record = train(tmp_path, method="dense", steps=1)
        model = DSCGPTForCausalLM.from_pretrained(tmp_path / "model")
        assert sum(p.numel() for p in model.parameters()) == record["params_total"]


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
        monkeypatch.setattr(lab_trainer, "peak_memory_bytes", lambda: 10**15)
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path, StopAt(2), method="dense")
        monkeypatch.setattr(lab_trainer, "peak_memory_bytes", lambda: 5)
        assert train(tmp_path, method="dense")["peak_memory_bytes"] == 10**15


def test_messages_of_transformers_are_as_before(train, tmp_path):
    before = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    train(tmp_path, method="dense", steps=1)
    assert (transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()) == before


def test_window_longer_than_a_split(train, tmp_path):
    with pytest.raises(ValueError, match="at least one window of length 4000"):
        train(tmp_path / "some" / "run", window=4000, total=200_000, active=190_000, method="dense")
    # A run that came to nothing leaves nothing.
    assert list(tmp_path.iterdir()) == []


def test_pipelines_take_the_models_folder(whole, capfd):
    folder, _ = whole("dsc")
    generator = pipeline("text-generation", str(folder / "model"))
    capfd.readouterr()
    # As long as its 16 positions allow, without being told.
    [output] = generator("some ", do_sample=False)
    assert output["generated_text"] == generate(folder, "some ", max_new_tokens=11, temperature=0)
    assert capfd.readouterr().err == ""


def test_several_processes_are_refused(train, tmp_path, monkeypatch):
    monkeypatch.setattr(TrainingArguments, "world_size", 2)
    with pytest.raises(ValueError, match="a run of the lab takes one process, got a launch of 2"):
        train(tmp_path)
