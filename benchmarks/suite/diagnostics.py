"""What it costs to measure the routed layers around a step of training: the same step, with and without.

A measurement every 100 steps, the default of :class:`torchdsc.diagnostics.DiagnosticsCallback`, adds a hundredth of the
ratio's excess over 1 to the time of training.
"""

from functools import partial

import torch
from torch import Tensor

from benchmarks.case import Benchmark, Case, Cases, Settings
from torchdsc.diagnostics import Diagnostics
from torchdsc.lab.experiment.config import Experiment, Job
from torchdsc.lab.experiment.values import read_experiment
from torchdsc.lab.schema import build
from torchdsc.lab.tasks.language_modelling.settings import Settings as RunSettings
from torchdsc.lab.training.environment import quiet_transformers
from torchdsc.optim import clip_grad_norm

from .presets import Run

SUBJECT, PLAIN = "step with a measurement", "step"
# Preset, its variant, and sequences of a batch.
MODELS = (("small", "DSC", 12), ("paper", "DSC", 4))


class MeasuredRun(Run):
    """A model whose steps are measured.

    Args:
        settings: Of the run.
        device: Where.
    """

    def __init__(self, settings: RunSettings, device: str) -> None:
        super().__init__(settings, device, training=True)
        self.diagnostics = Diagnostics(self.model)

    def train(self, ids: Tensor) -> Tensor:
        """One step and its measurement."""
        self.diagnostics.begin()
        self.model(ids, labels=ids).loss.backward()
        self.diagnostics.read_gradients()
        clip_grad_norm(self.model.parameters(), self.max_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return torch.tensor(self.diagnostics.end().metrics()["dsc/certified_norm"])


def _settings(preset: str, variant: str, *, quick: bool) -> RunSettings:
    experiment = build(Experiment, read_experiment(preset))
    job = Job(variant, {}, next(iter(experiment.cases)), seed=0, is_trial=False)
    settings: RunSettings = experiment.settings_of(job)
    if quick:
        sizes = {"d_model": 32, "n_head": 2, "n_layer": 1, "window": 32, "vocab_size": 256, "total": 4e4, "active": 3e4}
        return settings.model_copy(update={**sizes, "match": None})
    return settings.model_copy(update={"vocab_size": min(settings.vocab_size, 4096)})


def _cases(settings: Settings) -> Cases:
    torch.manual_seed(0)
    for preset, variant, batch in MODELS:
        own = _settings(preset, variant, quick=settings.quick)
        ids = torch.randint(own.vocab_size, (batch, own.window), device=settings.device)
        with quiet_transformers():
            plain, measured = Run(own, settings.device, training=True), MeasuredRun(own, settings.device)
        point: dict[str, int | str] = {"model": preset, "batch": batch, "tokens": own.window}
        yield Case(point, {SUBJECT: partial(measured.train, ids), PLAIN: partial(plain.train, ids)}, subject=SUBJECT)
    return {}


DIAGNOSTICS = Benchmark(
    "diagnostics",
    "a step of training with a measurement of its routed layers, over the same step without",
    ("tests/diagnostics",),
    _cases,
)
