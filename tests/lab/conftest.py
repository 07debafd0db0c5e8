"""A corpus of made-up sentences, and runs of seconds on it."""

import functools
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from torchdsc.lab.schema import build
from torchdsc.lab.tasks.language_modelling.data import Data, load_data
from torchdsc.lab.tasks.language_modelling.run import train_run
from torchdsc.lab.tasks.language_modelling.settings import Settings


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text of made-up sentences that a model can learn something from."""
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefgh", k=rng.randint(2, 6))) for _ in range(40)]
    path = tmp_path_factory.mktemp("corpus") / "sentences.txt"
    path.write_text("".join(" ".join(rng.choices(words, k=8)) + ".\n" for _ in range(1500)))
    return path


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of token files that belongs to the test."""
    monkeypatch.setenv("TORCHDSC_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="session")
def tiny(text_file: Path) -> Settings:
    """Settings of a run of seconds: bytes, one layer of 32, six steps."""
    return Settings(
        **{"corpus": str(text_file), "tokenizer": "bytes", "d_model": 32, "n_layer": 1, "n_head": 2, "window": 16},
        **{"total": 34_000, "active": 26_000, "steps": 6, "batch_size": 4, "warmup_steps": 2, "eval_every": 2},
        **{"eval_windows": 8, "test_windows": 8, "eval_batch_size": 4, "dropout": 0.1},
    )


@pytest.fixture(scope="session")
def tiny_data(tiny: Settings, tmp_path_factory: pytest.TempPathFactory) -> Data:
    """Their corpus, encoded."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHDSC_CACHE", str(tmp_path_factory.mktemp("tokens")))
        return load_data(tiny)


@pytest.fixture
def train(tiny: Settings, tiny_data: Data) -> Callable[..., dict[str, Any]]:
    """Trains in a folder, with callbacks and changed settings: returns the record."""

    def run(folder: Path, *callbacks: Any, **changes: Any) -> dict[str, Any]:
        settings = build(Settings, {**tiny.model_dump(), **changes})
        return train_run(settings, 1, tiny_data, folder, callbacks=list(callbacks))

    return run


@pytest.fixture(scope="session")
def whole(
    tiny: Settings, tiny_data: Data, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], tuple[Path, dict[str, Any]]]:
    """Runs that went through: method to folder and record."""

    @functools.cache
    def run(method: str) -> tuple[Path, dict[str, Any]]:
        folder = tmp_path_factory.mktemp(method)
        return folder, train_run(tiny.model_copy(update={"method": method}), 1, tiny_data, folder)

    return run
