"""An experiment of seconds: language models of one layer, by two trials each."""

from collections.abc import Callable

import pytest

from torchdsc.lab.experiment.config import Experiment
from torchdsc.lab.schema import build
from torchdsc.lab.tasks.language_modelling.settings import Settings

VARIANTS = [
    {"name": "Dense", "settings": {"method": "dense"}, "trials": [{"learning_rate": 1e-9}, {"learning_rate": 1e-2}]},
    {
        "name": "DSC K 2",
        "settings": {"top_k": 2, "feed_forward": {"gate": "mean"}},
        "trials": [{"feed_forward": {"gamma_init": 0.2}}, {"feed_forward": {"gamma_init": 0.4}}],
    },
    {"name": "DSC", "against": ["DSC K 2", "Dense"]},
]


@pytest.fixture(scope="session")
def make_experiment(tiny: Settings) -> Callable[..., Experiment]:
    """An experiment of three variants, two seeds and four trials; keywords replace its values."""
    settings = tiny.model_dump(exclude_unset=True)

    def make(**changes: object) -> Experiment:
        values = {"settings": settings, "trial_settings": {"steps": 4}, "variants": VARIANTS, "seeds": [1, 2]}
        return build(Experiment, {**values, "timing_rounds": 6, **changes})

    return make
