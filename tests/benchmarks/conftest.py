"""A clock that only calls move, and a benchmark on it."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# Benchmarks live in the checkout: nothing installs them.
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))


class Clock:
    """Seconds that pass only when a call says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def call(self, seconds: Sequence[float]) -> Callable[[], None]:
        """A call that takes these seconds, one after the other, over and over."""
        turn = iter(range(10**6))

        def run() -> None:
            self.now += seconds[next(turn) % len(seconds)]

        return run


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[Clock]:
    clock = Clock()
    with monkeypatch.context() as patch:
        patch.setattr(time, "perf_counter", lambda: clock.now)
        yield clock
