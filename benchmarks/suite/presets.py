"""Whole models of presets, as the first trial of each variant has them, timed.

A forward pass in evaluation, and a whole step of training. Tokens are random and weights new: what a corpus would
change is how often n-grams, and so rows of banks and tables, come again.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.case import Benchmark, Case, Cases, Settings
from torchdsc.lab.experiment.config import Experiment, Job
from torchdsc.lab.experiment.values import read_experiment
from torchdsc.lab.schema import build
from torchdsc.lab.tasks.language_modelling.run import build_model, make_plan, optimizer_of
from torchdsc.lab.tasks.language_modelling.settings import Settings as RunSettings
from torchdsc.lab.training.environment import quiet_transformers
from torchdsc.optim import clip_grad_norm

from .layer import EXPERT_KERNELS, GATHERS_EXPERTS

# Preset, and the variant whose time is compared.
SUBJECTS = {"sparse": "DSC by n-grams", "sparse-ratios": "DSC by n-grams, 16", "ablations": "DSC"}
# By what quick runs divide the parameters: product keys of the smaller preset would not fit in an eighth.
_SHARES = {"sparse": 8, "sparse-ratios": 5, "ablations": 7}
BATCH = 8
KINDS = ("forward", "training")


class Run:
    """A model of a run, and the optimizer that would train it.

    Args:
        settings: Of the run.
        device: Where.
        training: Whether it is to be trained; evaluated otherwise.
    """

    def __init__(self, settings: RunSettings, device: str, *, training: bool) -> None:
        plan = make_plan(settings, settings.vocab_size)
        self.model: Any = build_model(settings, plan, settings.vocab_size).to(device).train(training)
        self.max_norm = settings.max_grad_norm
        self.optimizer = optimizer_of(settings, self.model)

    @torch.no_grad()
    def forward(self, ids: Tensor) -> Tensor:
        """Logits of tokens (B, T)."""
        logits: Tensor = self.model(ids, use_cache=False).logits
        return logits

    def train(self, ids: Tensor) -> Tensor:
        """One step on tokens (B, T) at the peak of the schedule, and its loss with the regularisers."""
        loss: Tensor = self.model(ids, labels=ids).loss
        loss.backward()
        clip_grad_norm(self.model.parameters(), self.max_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()


def run_settings(preset: str, *, quick: bool) -> dict[str, RunSettings]:
    """Settings of each variant's run, by name, as its first trial has them.

    Args:
        preset: Name of the experiment.
        quick: Half of every width and count, and half the layers: the same shapes, at a fraction of the parameters.
    """
    experiment = build(Experiment, read_experiment(preset))
    found = {}
    for variant in experiment.variants:
        first = next(iter(variant.trials), {})
        job = Job(variant.name, first, next(iter(experiment.cases)), seed=0, is_trial=False)
        settings = experiment.settings_of(job)
        found[variant.name] = _small(settings, _SHARES[preset]) if quick else settings
    return found


def _small(settings: RunSettings, share: int) -> RunSettings:
    options = dict(settings.feed_forward)
    if "ngram_rows" in options:
        # An eighth of the parameters: half the layers, and rows of about half the features.
        tables = len(options["ngram_orders"]) * 4
        wide, narrow = (-(-width // tables) for width in (settings.d_model, settings.d_model // 2))
        options["ngram_rows"] = options["ngram_rows"] * wide // (4 * narrow)
    return settings.model_copy(
        update={
            "d_model": settings.d_model // 2,
            "n_layer": settings.n_layer // 2,
            "vocab_size": settings.vocab_size // 4,
            "window": settings.window // 8,
            "total": settings.total / share,
            "active": settings.active / share,
            "feed_forward": options,
        }
    )


def by_kernel(settings: Mapping[str, RunSettings]) -> tuple[dict[str, RunSettings], dict[str, str]]:
    """Settings by call: those of MoE once for each expert kernel. And the kernels left out, with the reason."""
    calls, left_out = {}, {}
    for name, each in settings.items():
        if each.method != "moe":
            calls[name] = each
            continue
        for kernel in EXPERT_KERNELS:
            call = f"{name} ({kernel})"
            if kernel == "batched_mm":
                left_out[call] = GATHERS_EXPERTS
            else:
                calls[call] = each.model_copy(update={"feed_forward": {**each.feed_forward, "impl": kernel}})
    return calls, left_out


def _cases(preset: str, settings: Settings) -> Cases:
    variants, subject = run_settings(preset, quick=settings.quick), SUBJECTS[preset]
    calls, left_out = by_kernel(variants)
    torch.manual_seed(0)
    common = variants[subject]
    ids = torch.randint(common.vocab_size, (BATCH, common.window), device=settings.device)
    for kind in KINDS:
        training = kind == "training"
        with quiet_transformers():
            runs = {name: Run(each, settings.device, training=training) for name, each in calls.items()}
        point: dict[str, int | str] = {"kind": kind, "batch": BATCH, "tokens": common.window}
        steps = {name: partial(run.train if training else run.forward, ids) for name, run in runs.items()}
        yield Case(point, steps, subject=subject, left_out=left_out)
        for name, run in runs.items():
            # A model that has diverged takes other ways than one that trains.
            assert all(parameter.isfinite().all() for parameter in run.model.parameters()), name
    # Ratios of kernels depend on the instructions, and the processor's name alone does not tell.
    return {"instructions": torch.backends.cpu.get_cpu_capability(), "parameters": _parameters(variants)}


def _parameters(variants: Mapping[str, RunSettings]) -> dict[str, dict[str, int]]:
    """Stored and active parameters of each variant's model."""
    plans = {name: make_plan(settings, settings.vocab_size) for name, settings in variants.items()}
    return {name: {"stored": plan.params_total, "active": plan.params_active} for name, plan in plans.items()}


_TESTS = (
    *("tests/ops", "tests/nn", "tests/baselines", "tests/models", "tests/test_optim.py"),
    "tests/benchmarks/test_presets.py",
)
_WORDS = "at equal active parameters: a forward pass, and a step of training"
SPARSE = Benchmark("sparse", f"whole models of the preset sparse, {_WORDS}", _TESTS, partial(_cases, "sparse"))
ABLATIONS = Benchmark(
    "ablations",
    "whole models of the preset ablations: a forward pass, and a step of training",
    _TESTS,
    partial(_cases, "ablations"),
)
SPARSE_RATIOS = Benchmark(
    "sparse_ratios", f"whole models of the preset sparse-ratios, {_WORDS}", _TESTS, partial(_cases, "sparse-ratios")
)
