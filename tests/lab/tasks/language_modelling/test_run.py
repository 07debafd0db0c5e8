"""One language model's run: its model, its optimizer, and what it records."""

import json
import math

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional
from transformers import TrainerCallback, pipeline

from torchdsc.lab.budget import METHODS
from torchdsc.lab.data.tokens import FixedWindows
from torchdsc.lab.tasks.language_modelling import run
from torchdsc.lab.tasks.language_modelling.run import build_model, make_plan, train_run
from torchdsc.lab.training import runs
from torchdsc.lab.training.generation import generate
from torchdsc.models import DSCGPTForCausalLM
from torchdsc.optim import JoinedOptimizer, clip_grad_norm, parameter_groups


class TestParameterGroups:
    @pytest.mark.parametrize("method", METHODS)
    def test_every_parameter_is_in_its_group(self, tiny, method):
        options = {"input_context": 2}
        if method != "dense":
            options |= {"router_input": "embeddings", "router_context": 2}
        if method not in ("dense", "gated"):
            options |= {"router_norm": "layer_affine"}
        settings = tiny.model_copy(update={"method": method, "feed_forward": options})
        model = build_model(settings, make_plan(settings, 320), 320)
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
            elif "bank" in name or (method == "peer" and name.endswith(("dsc.down", "dsc.up"))):
                expected = (5e-4, 0.02)
            else:
                expected = (1e-3, 0.02)
            assert settings[id(parameter)] == expected, name

    def test_frozen_parameters_are_left_out(self, tiny):
        model = build_model(tiny, make_plan(tiny, 320), 320)
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


def test_the_initial_scale_is_a_setting(tiny):
    for std in (0.02, 0.3):
        settings = tiny.model_copy(update={"method": "dense", "residual_init": "none", "initializer_range": std})
        model = build_model(settings, make_plan(settings, 320), 320)
        for weight in (model.model.embed_tokens.weight, model.model.blocks[0].feed_forward.up.weight):
            assert weight.std().item() == pytest.approx(std, rel=0.05)


class TestRecord:
    @pytest.mark.parametrize("method", METHODS)
    def test_is_complete(self, whole, tiny, tiny_data, method):
        folder, record = whole(method)
        assert {*run._REQUIRED, *runs._REQUIRED} <= set(record)
        assert json.loads((folder / "record.json").read_text()) == record
        assert (record["method"], record["seed"], record["steps"]) == (method, 1, 6)
        assert record["tokens"] == 6 * 4 * 16
        assert record["config"] == {**tiny.model_dump(), "method": method}
        assert record["data"] == {"sentences.txt": tiny_data.corpus.sha256}
        assert record["bytes_per_token"] == 1.0
        # A window of 16 tokens has no room for a sample of text.
        assert record["sample"] is None
        assert (record["routing"] is None) == (method in ("dense", "gated"))
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
        assert all(point["grad_norm"] > 0 for point in record["train_curve"])
        history = record["routing"]["history"]
        assert [point["step"] for point in history] == [2, 4, 6]
        for point in history:
            assert 1 < point["effective_rank_u"] <= 32
            assert 0 < point["measured_norm"] < point["certified_norm"]
            assert point["gradient_norm_atoms"] > 0
            assert point["turn"] > 0
            assert point["local_lipschitz"] > 0
            assert 0 <= point["changed"] <= 1
            assert point["noise_norm"] > 0
        assert "kept" not in history[0]
        assert all(sum(point["histogram"]) == pytest.approx(1.0) for point in history)
        assert all(0 < point["kept"] <= 1 for point in history[1:])

    def test_sample_goes_on_from_the_validation_part(self, train, tiny_data, tmp_path):
        record = train(tmp_path, window=80, method="dense", steps=1, warmup_steps=0)
        assert tiny_data.corpus.valid.startswith(record["sample"]["prompt"])
        assert len(record["sample"]["prompt"]) == 16
        assert 0 < len(record["sample"]["text"]) <= 48

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

    def test_a_trial_that_diverges_has_no_test_loss(self, tiny, tiny_data, tmp_path):
        wild = tiny.model_copy(update={"method": "dense", "learning_rate": 1e30})
        assert train_run(wild, 1, tiny_data, tmp_path, is_trial=True)["test_loss"] is None

    def test_one_that_does_not_is_none(self, whole):
        assert whole("dense")[1]["diverged_at_step"] is None


SPARSE = {"router": "product_key", "router_rank": 8, "sparse_gradients": True, "frame_samples": 8}


class TestSparseBanks:
    """Banks with row-sparse gradients through Trainer: their optimizer, clipping, checkpoints."""

    def changes(self, **options):
        return {"feed_forward": SPARSE | options}

    def test_first_step_is_that_of_dense_gradients(self, train, tmp_path):
        """Adam's first step leaves rows without a gradient alone, so that the two must agree."""
        settings = {"dropout": 0.0, "weight_decay": 0.0, "steps": 1, "warmup_steps": 0, "eval_every": 1}
        trained = []
        for sparse in (True, False):
            folder = tmp_path / str(sparse)
            train(folder, **settings, **self.changes(sparse_gradients=sparse, frame_weight=0.0))
            trained.append(load_file(folder / "model" / "model.safetensors"))
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
            JoinedOptimizer(torch.optim.SGD([group]) for group in groups).step(lambda: 0.0)


def test_model_of_a_killed_run_is_replaced(train, tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model.safetensors").write_bytes(b"half")
    record = train(tmp_path, method="dense", steps=1)
    model = DSCGPTForCausalLM.from_pretrained(tmp_path / "model")
    assert sum(p.numel() for p in model.parameters()) == record["params_total"]


def test_pipelines_take_the_models_folder(whole, capfd):
    folder, _ = whole("dsc")
    generator = pipeline("text-generation", str(folder / "model"))
    capfd.readouterr()
    # As long as its 16 positions allow, without being told.
    [output] = generator("some ", do_sample=False)
    assert output["generated_text"] == generate(folder, "some ", max_new_tokens=11, temperature=0)
    assert capfd.readouterr().err == ""
