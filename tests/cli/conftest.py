"""A command line in this process, and an experiment of seconds for it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml

from torchdsc.cli.main import main


class Outcome(NamedTuple):
    """What a command left behind."""

    status: int
    out: str
    err: str


@pytest.fixture
def torchdsc(capsys: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """Runs a command line."""

    def run(*arguments: object) -> Outcome:
        capsys.readouterr()
        try:
            status = main([str(argument) for argument in arguments])
        except SystemExit as leave:  # as argparse does after help
            status = int(leave.code or 0)
        return Outcome(status, *capsys.readouterr())

    return run


@pytest.fixture
def fails(torchdsc: Callable[..., Outcome]) -> Callable[..., str]:
    """Runs a command line that is wrong: returns its one line on standard error."""

    def run(*arguments: object) -> str:
        status, out, err = torchdsc(*arguments)
        assert (status, out) == (2, "")
        assert err.count("\n") == 1, err
        return err.rstrip("\n")

    return run


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder, with a cache of its own."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("TORCHDSC_CACHE", str(tmp_path / "cache"))
    return tmp_path / "here"


@pytest.fixture
def tiny(tmp_path: Path, workplace: Path) -> Path:
    """An experiment of seconds: Dense and MoE on bytes, one layer of 32, two steps."""
    text = tmp_path / "text.txt"
    text.write_text("".join(f"sentence number {i} of a text to learn from.\n" for i in range(500)))
    settings = {
        **{"corpus": str(text), "tokenizer": "bytes", "d_model": 32, "n_layer": 1, "n_head": 2, "window": 16},
        **{"total": 34_000, "active": 26_000, "steps": 2, "batch_size": 4, "warmup_steps": 1, "eval_every": 1},
        **{"eval_windows": 8, "test_windows": 8, "eval_batch_size": 4},
    }
    variants = [{"name": "Dense", "settings": {"method": "dense"}}, {"name": "MoE", "settings": {"method": "moe"}}]
    file = tmp_path / "tiny.yaml"
    file.write_text(yaml.safe_dump({"settings": settings, "variants": variants, "seeds": [3], "timing_rounds": 2}))
    return file
