"""Where the masked product overtakes the gathered one: the measurement that ``impl="auto"`` follows."""

import json
from collections.abc import Callable
from importlib import resources
from itertools import product
from pathlib import Path
from typing import Any

import torch

from benchmarks.case import Benchmark, Case, Cases, Settings
from torchdsc.lab.files import write_text
from torchdsc.ops import compose

TOKENS = (16, 256, 4096)
WIDTHS = (64, 384)
RATIOS = (0.01, 0.03, 0.06, 0.12, 0.25, 0.5, 1.0)
ATOMS = (64, 512, 4096)
# The crossover's value where gathering always wins: above every K / M.
NEVER = 2.0


def _cases(settings: Settings) -> Cases:
    points = []
    sizes = product((16,), (64,), (16,)) if settings.quick else product(TOKENS, ATOMS, WIDTHS)
    for tokens, atoms, width in sizes:
        quicker: list[float] = []
        for ratio in RATIOS:
            # Past the crossover the rest is known, and gathering is slow.
            if quicker and quicker[-1] < 0.7:
                break
            row = yield _case(tokens, atoms, width, ratio, settings.device)
            quicker.append(row["calls"]["gather"]["subject_over_it"]["median"])
        points.append({"tokens": tokens, "atoms": atoms, "width": width, "ratio": crossover(quicker)})
    return {"crossovers": points}


def _case(tokens: int, atoms: int, width: int, ratio: float, device: str) -> Case:
    top_k = max(1, round(ratio * atoms))
    x = torch.randn(tokens, width, device=device, requires_grad=True)
    u = torch.randn(atoms, width, device=device, requires_grad=True)
    v = torch.randn(atoms, width, device=device, requires_grad=True)
    coefficients = torch.rand(tokens, top_k, device=device, requires_grad=True)
    indices = torch.rand(tokens, atoms, device=device).topk(top_k).indices

    def step(impl: Any) -> Callable[[], object]:
        def call() -> None:
            y = compose(x, u, v, indices, coefficients, impl=impl)
            torch.autograd.grad(y, (x, u, v, coefficients), torch.ones_like(y))

        return call

    calls = {"dense": step("dense"), "gather": step("gather")}
    return Case({"tokens": tokens, "M": atoms, "d": width, "K": top_k}, calls, subject="dense")


def crossover(dense_over_gather: list[float]) -> float:
    """K / M at which the two cost the same, between the measured ratios; above 1 where gathering always wins."""
    # With few pairs gathering has a fixed cost of its own: what counts is where it wins for the last time.
    last = max((index for index, ratio in enumerate(dense_over_gather) if ratio >= 1), default=None)
    if last is None:
        return RATIOS[0]
    if last + 1 == len(dense_over_gather):
        return NEVER
    (low, high), (before, after) = RATIOS[last : last + 2], dense_over_gather[last : last + 2]
    return round(low + (high - low) * (before - 1) / (before - after), 3)


def publish(result: dict[str, Any]) -> None:
    """Write the crossovers where the package reads them, and leave those of other devices."""
    path = Path(str(resources.files("torchdsc.ops.compose").joinpath("crossovers.json")))
    kept = json.loads(path.read_text(encoding="utf-8"))["crossovers"]
    crossovers = {**kept, result["device"]: result["crossovers"]}
    write_text(
        path, json.dumps({"source": "python -m benchmarks crossover", "crossovers": crossovers}, indent=1) + "\n"
    )


CROSSOVER = Benchmark(
    "crossover",
    "the share K / M from which the masked product is quicker than gathering",
    ("tests/ops/compose",),
    _cases,
    publish=publish,
)
