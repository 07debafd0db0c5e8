"""Made-up run records of a comparison, of the size and shape that training gives, and experiments of seconds."""

from __future__ import annotations

import copy
import functools
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from torchdsc.lab.config import ExperimentConfig
from torchdsc.lab.corpora import load_corpus
from torchdsc.lab.tokenizers import load_tokenizer
from torchdsc.lab.tokens import tokenize_corpus
from torchdsc.lab.training import Data

SIZES = {
    "dense": (35_000_000, 35_000_000, "width 2611"),
    "moe": (35_540_000, 28_000_000, "5 experts of 545, top-2"),
    "mixture_of_loras": (35_010_000, 28_000_000, "509 LoRAs of rank 1, top-4"),
    "dsc": (35_010_000, 28_000_000, "M 509, K 4, static width 106"),
}
LOSSES = {"dense": 3.482, "moe": 3.431, "mixture_of_loras": 3.447, "dsc": 3.412}
LATENCIES = {"dense": 39.9, "moe": 60.55, "mixture_of_loras": 50.4, "dsc": 51.2}


def _curve(rng: random.Random, end: float, steps: int, evaluations: int) -> list[dict[str, Any]]:
    points = []
    for index in range(evaluations + 1):
        step = steps * index // evaluations if evaluations else steps
        loss = end + (8.3 - end) * math.exp(-step / (0.11 * steps)) + 0.35 * (1 - step / steps) ** 2
        points.append({"step": step, "tokens": step * 16384, "val_loss": loss + rng.gauss(0, 0.002)})
    return points


def _layer(rng: random.Random, method: str, depth: int) -> dict[str, Any]:
    num_atoms = {"moe": 5, "mixture_of_loras": 509, "dsc": 509}[method]
    skew = {"moe": 0.3, "mixture_of_loras": 1.6, "dsc": 1.0}[method] * (1 + 0.08 * depth)
    loads = sorted((math.exp(skew * rng.gauss(0, 1)) for _ in range(num_atoms)), reverse=True)
    if method == "mixture_of_loras":
        loads = [load if rank < 0.9 * num_atoms else 0.0 for rank, load in enumerate(loads)]
    shares = [load / sum(loads) for load in loads]
    entropy = -sum(share * math.log(share) for share in shares if share)
    strength = 1.0 + 0.05 * depth + rng.gauss(0, 0.02)
    return {
        "num_atoms": num_atoms,
        "utilization": sum(share > 0 for share in shares) / num_atoms,
        "effective_atoms": math.exp(entropy),
        "strength": strength if method == "dsc" else None,
        "gate": math.tanh(strength) if method == "dsc" else None,
        "load": shares[:: math.ceil(num_atoms / 200)],
    }


def _routing(rng: random.Random, method: str, curve: list[dict[str, Any]]) -> dict[str, Any] | None:
    if method == "dense":
        return None
    layers = [_layer(rng, method, depth) for depth in range(4)]
    used = sum(layer["utilization"] for layer in layers) / len(layers)
    history = []
    for point in curve:
        progress = point["step"] / curve[-1]["step"]
        strength = 1.1 + 4.8 * math.exp(-progress * 12) + rng.gauss(0, 0.01)
        row: dict[str, Any] = {"step": point["step"], "effective_atoms": layers[0]["effective_atoms"]}
        row["utilization"] = used + (1 - used) * math.exp(-progress * 5) * 0.4
        row["strength"] = strength if method == "dsc" else None
        row["gate"] = math.tanh(strength) if method == "dsc" else None
        history.append(row)
    return {"history": history, "layers": layers}


@functools.cache
def make_run(method: str, seed: int, *, steps: int = 2000, evaluations: int = 16) -> dict[str, Any]:
    """One record as `torchdsc compare` writes it."""
    rng = random.Random(f"{method} {seed}")
    total, active, description = SIZES[method]
    curve = _curve(rng, LOSSES[method] + rng.gauss(0, 0.005), steps, evaluations)
    best = min(point["val_loss"] for point in curve)
    latency = LATENCIES[method] * (1 + rng.gauss(0, 0.005))
    return {
        **{"method": method, "seed": seed, "params_total": total, "params_active": active},
        **{"tokens": steps * 16384, "steps": steps, "val_loss_best": best},
        **{"val_loss_final": curve[-1]["val_loss"], "test_loss": best + 0.021},
        "latency_ms": {"median": latency, "q1": latency * 0.985, "q3": latency * 1.02, "batch": [16, 256]},
        "peak_memory_bytes": 5 * 2**30,
        "train_seconds": latency * steps * 8 * 3 / 1000,
        "curve": curve,
        "train_curve": [{"step": point["step"], "loss": point["val_loss"] + 0.1, "task_loss": 1.0} for point in curve],
        "routing": _routing(rng, method, curve),
        "description": description,
        "config": {
            **{"method": method, "seed": seed, "model": {"d_model": 384, "num_layers": 4, "num_heads": 6}},
            **{"optimizer": {"lr": 6e-4, "betas": [0.9, 0.95], "weight_decay": 0.02}, "feed_forward": description},
        },
        "corpus": {"name": "python-stdlib", "sha256": "9f2b" * 16},
        "versions": {"python": "3.11.2", "torch": "2.13.0", "torchdsc": "0.1.0"},
        "hardware": {"device": "Example Accelerator", "memory_gib": 16, "threads": 8},
        "commit": "0123456789abcdef0123456789abcdef01234567",
        "command": "torchdsc compare --preset paper --seeds 42 1337",
    }


@pytest.fixture
def make_runs() -> Callable[..., list[dict[str, Any]]]:
    """Returns a maker of records: every method with every seed, unless told otherwise."""

    def make(methods: tuple[str, ...] = tuple(SIZES), seeds: tuple[int, ...] = (42, 1337), **options: int) -> Any:
        return [copy.deepcopy(make_run(method, seed, **options)) for method in methods for seed in seeds]

    return make


@pytest.fixture(scope="session")
def usual_runs() -> list[dict[str, Any]]:
    """Records of every method with two seeds, not to be changed."""
    return [make_run(method, seed) for method in SIZES for seed in (42, 1337)]


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
def tiny(text_file: Path) -> ExperimentConfig:
    """An experiment of seconds: bytes, one layer of 32, six steps."""
    return ExperimentConfig(
        **{"corpus": str(text_file), "tokenizer": "bytes", "d_model": 32, "n_layer": 1, "n_head": 2, "window": 16},
        **{"total": 34_000, "active": 26_000, "steps": 6, "batch_size": 4, "warmup_steps": 2, "eval_every": 2},
        **{"eval_windows": 8, "test_windows": 8, "eval_batch_size": 4, "latency_rounds": 2, "dropout": 0.1},
    )


@pytest.fixture(scope="session")
def tiny_data(tiny: ExperimentConfig, tmp_path_factory: pytest.TempPathFactory) -> Data:
    """Its corpus, encoded."""
    corpus = load_corpus(tiny.corpus)
    tokenizer = load_tokenizer("bytes", corpus)
    tokens = tokenize_corpus(corpus, tokenizer, cache_dir=tmp_path_factory.mktemp("tokens"))
    return Data(corpus, tokens, tokenizer)
