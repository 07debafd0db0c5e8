"""Latency measured in turn: what is compared runs round by round in one process, so that drift hits all alike."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import quantiles

import torch

__all__ = ["Timing", "measure_in_turn"]


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one call: median and quartiles over rounds."""

    median: float
    q1: float
    q3: float
    samples: list[float]


def measure_in_turn(
    functions: Mapping[str, Callable[[], object]], *, rounds: int = 20, warmup: int = 3
) -> dict[str, Timing]:
    """Time each function once a round, in turn.

    Args:
        functions: What to time, by name.
        rounds: Counted rounds, at least 2.
        warmup: Rounds before them.

    Returns:
        Timings by name; samples of one round belong together.

    Raises:
        ValueError: If ``rounds`` is below 2.
    """
    if rounds < 2:
        raise ValueError(f"rounds must be >= 2, got {rounds}")
    samples: dict[str, list[float]] = {name: [] for name in functions}
    for index in range(warmup + rounds):
        for name, function in functions.items():
            _wait()
            start = time.perf_counter()
            function()
            _wait()
            if index >= warmup:
                samples[name].append((time.perf_counter() - start) * 1e3)
    return {name: _timing(values) for name, values in samples.items()}


def _timing(values: list[float]) -> Timing:
    q1, median, q3 = quantiles(values, n=4, method="inclusive")
    return Timing(median, q1, q3, values)


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
