"""The benchmark times the models of the preset, in evaluation and through whole steps."""

import copy

import pytest
import torch

from benchmarks.case import Settings
from benchmarks.suite import load
from benchmarks.suite.presets import SUBJECTS, Run, by_kernel, run_settings
from torchdsc.baselines import StandardMoE
from torchdsc.lab.budget import describe_misses
from torchdsc.lab.experiment.values import read_experiment
from torchdsc.lab.tasks.language_modelling.run import make_plan
from torchdsc.optim import build_optimizer

PRESET, SUBJECT = read_experiment("sparse"), SUBJECTS["sparse"]


@pytest.fixture(scope="module")
def drained():
    """The cases, and what they add up to."""
    cases, found = load("sparse").cases(Settings(quick=True)), []
    try:
        while True:
            found.append(next(cases))
    except StopIteration as stop:
        return found, stop.value


@pytest.fixture
def run():
    return Run(run_settings("sparse", quick=True)[SUBJECT], "cpu", training=True)


def run_of(call):
    return call.func.__self__


class TestSettings:
    def test_are_those_of_first_trials(self):
        found = run_settings("sparse", quick=False)
        assert list(found) == [variant["name"] for variant in PRESET["variants"]]
        for variant in PRESET["variants"]:
            expected = {**PRESET["settings"], **variant["settings"], **variant["trials"][0]}
            settings = found[variant["name"]]
            assert {name: getattr(settings, name) for name in expected} == expected

    def test_budgets_are_met(self):
        for name, settings in run_settings("sparse", quick=False).items():
            plan = make_plan(settings, settings.vocab_size)
            assert settings.vocab_size == 4096
            assert describe_misses(plan, settings.budget(settings.vocab_size)) == []
            if name != "Gated dense, as many stored":
                assert plan.params_active == pytest.approx(1_178_000, rel=0.01)

    def test_moe_by_kernel(self):
        settings = run_settings("sparse", quick=True)
        calls, left_out = by_kernel(settings)
        moes = ["MoE (eager)", "MoE (grouped_mm)"]
        assert [name for name in calls if name not in settings] == moes
        assert set(settings) - set(calls) == {"MoE"}
        assert set(left_out) == {"MoE (batched_mm)"}
        for name in moes:
            layers = [m for m in Run(calls[name], "cpu", training=False).model.modules() if isinstance(m, StandardMoE)]
            assert layers
            assert all(name == f"MoE ({layer.impl})" for layer in layers)


class TestCases:
    def test_points(self, drained):
        cases, summary = drained
        assert [case.point for case in cases] == [
            {"kind": kind, "batch": 8, "tokens": 16} for kind in ("forward", "training")
        ]
        assert {case.subject for case in cases} == {SUBJECT}
        assert summary["instructions"] == torch.backends.cpu.get_cpu_capability()

    def test_parameters_are_those_of_the_models(self, drained):
        cases, summary = drained
        assert list(summary["parameters"]) == list(run_settings("sparse", quick=True))
        for name, call in cases[0].calls.items():
            counted = sum(parameter.numel() for parameter in run_of(call).model.parameters())
            assert summary["parameters"][name.partition(" (")[0]]["stored"] == counted
        # Every one of them is active.
        dense = summary["parameters"]["Gated dense"]
        assert dense["active"] == dense["stored"]
        assert summary["parameters"][SUBJECT]["active"] < summary["parameters"][SUBJECT]["stored"] / 10

    def test_forward_is_in_evaluation(self, drained):
        for name, call in drained[0][0].calls.items():
            model = run_of(call).model
            before = copy.deepcopy(model.state_dict())
            logits = call()
            assert not model.training
            assert not logits.requires_grad
            assert logits.shape == (8, 16, model.config.vocab_size), name
            assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())

    def test_training_learns(self, drained):
        for name, call in drained[0][1].calls.items():
            assert run_of(call).model.training
            losses = [call().item() for _ in range(4)]
            assert losses[-1] < losses[0], name

    def test_a_model_that_diverges_is_refused(self):
        cases = load("sparse").cases(Settings(quick=True))
        with torch.no_grad():
            next(run_of(next(cases).calls["PEER"]).model.parameters()).fill_(torch.nan)
        with pytest.raises(AssertionError, match="PEER"):
            next(cases)


@pytest.mark.parametrize("preset", SUBJECTS)
def test_quick_models_of_every_preset_can_be_built(preset):
    for name, settings in run_settings(preset, quick=True).items():
        assert make_plan(settings, settings.vocab_size).params_total > 0, name


def test_a_step_is_that_of_a_training_loop(run):
    settings = run_settings("sparse", quick=True)[SUBJECT]
    model = copy.deepcopy(run.model)
    optimizer = build_optimizer(
        model,
        learning_rate=0.01,
        weight_decay=settings.weight_decay,
        router_lr_multiplier=1.0,
        atom_lr_multiplier=4.0,
        betas=(0.9, 0.95),
    )
    ids = torch.randint(settings.vocab_size, (2, settings.window))
    clipped = []
    for _ in range(2):
        loss = model(ids, labels=ids).loss
        loss.backward()
        clipped.append(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0) > 1)
        optimizer.step()
        optimizer.zero_grad()
        torch.testing.assert_close(run.train(ids), loss.detach())
    assert any(clipped)
    for name, parameter in run.model.named_parameters():
        torch.testing.assert_close(parameter, model.get_parameter(name))
        assert parameter.grad is None
