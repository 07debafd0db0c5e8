"""A series of made-up columns, and runs of seconds on it."""

import functools
import math
import random

import pytest

from torchdsc.lab.schema import build
from torchdsc.lab.tasks.forecasting.data import load_data
from torchdsc.lab.tasks.forecasting.run import train_run
from torchdsc.lab.tasks.forecasting.settings import Settings

ROWS = 420


@pytest.fixture(scope="session")
def series(tmp_path_factory):
    """A file of three columns that a model can learn something from, with more rows than are used."""
    rng = random.Random(0)
    lines = ["date,load,oil,spare"]
    for row in range(ROWS):
        values = [math.sin(row * math.tau / period) * size for period, size in ((8, 5.0), (12, 0.3), (16, 70.0))]
        lines.append(",".join([f"2016-07-{row}", *(f"{value * rng.uniform(0.9, 1.1) + 20:.6f}" for value in values)]))
    path = tmp_path_factory.mktemp("series") / "waves.csv"
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture(scope="session")
def tiny(series):
    """Settings of a run of seconds: one layer of 16 over three patches, six steps."""
    return Settings(
        **{"source": str(series), "train_rows": 240, "valid_rows": 80, "test_rows": 60, "look_back": 16, "horizon": 4},
        **{"patch_length": 8, "stride": 4, "d_model": 16, "n_layer": 1, "n_head": 2, "dropout": 0.1},
        **{"total": 5_000, "active": 3_000, "steps": 6, "batch_size": 4, "warmup_steps": 2, "eval_every": 2},
        **{"eval_windows": 13, "test_windows": None, "eval_batch_size": 8, "learning_rate": 4e-3},
    )


@pytest.fixture(scope="session")
def tiny_data(tiny):
    """Their series."""
    return load_data(tiny)


@pytest.fixture
def train(tiny, tiny_data):
    """Trains in a folder, with callbacks and changed settings: returns the record."""

    def run(folder, *callbacks, is_trial=False, **changes):
        settings = build(Settings, {**tiny.model_dump(), **changes})
        return train_run(settings, 1, tiny_data, folder, callbacks=list(callbacks), is_trial=is_trial)

    return run


@pytest.fixture(scope="session")
def whole(tiny, tiny_data, tmp_path_factory):
    """Runs that went through: method to folder and record."""

    @functools.cache
    def run(method):
        folder = tmp_path_factory.mktemp(method)
        return folder, train_run(tiny.model_copy(update={"method": method}), 1, tiny_data, folder)

    return run
