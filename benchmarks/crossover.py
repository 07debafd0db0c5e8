"""Where the masked product overtakes the gathered one: the measurement that ``impl="auto"`` follows."""

import json
from importlib import resources
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import torch

from torchdsc.lab.latency import measure_in_turn
from torchdsc.ops import compose

TOKENS = (16, 256, 4096)
WIDTHS = (64, 384)
RATIOS = (0.01, 0.03, 0.06, 0.12, 0.25, 0.5, 1.0)
ATOMS = (512, 4096)


def measure(rounds: int) -> dict[str, Any]:
    """Time both over tokens, widths and K / M; write the crossovers where the package reads them."""
    rounds = rounds or 9
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows, points = [], []
    for tokens, atoms, width in product(TOKENS, ATOMS, WIDTHS):
        quicker: list[float] = []
        for ratio in RATIOS:
            # Past the crossover the rest is known, and gathering is slow.
            if quicker and quicker[-1] < 0.7:
                break
            row = _row(tokens, atoms, width, ratio, rounds, device)
            rows.append(row)
            quicker.append(row["dense_over_gather"])
            print({key: row[key] for key in ("tokens", "atoms", "width", "top_k", "dense_over_gather")}, flush=True)
        points.append({"tokens": tokens, "atoms": atoms, "width": width, "ratio": _crossover(quicker)})
    path = Path(str(resources.files("torchdsc.ops.compose").joinpath("crossovers.json")))
    kept = json.loads(path.read_text(encoding="utf-8"))["crossovers"]
    measured = {"source": "python -m benchmarks crossover", "crossovers": {**kept, device: points}}
    path.write_text(json.dumps(measured, indent=1) + "\n", encoding="utf-8")
    return {"rows": rows, "crossovers": points}


def _row(tokens: int, atoms: int, width: int, ratio: float, rounds: int, device: str) -> dict[str, Any]:
    top_k = max(1, round(ratio * atoms))
    x = torch.randn(tokens, width, device=device, requires_grad=True)
    u = torch.randn(atoms, width, device=device, requires_grad=True)
    v = torch.randn(atoms, width, device=device, requires_grad=True)
    coefficients = torch.rand(tokens, top_k, device=device, requires_grad=True)
    indices = torch.rand(tokens, atoms, device=device).topk(top_k).indices

    def step(impl: Any) -> Any:
        def call() -> None:
            y = compose(x, u, v, indices, coefficients, impl=impl)
            torch.autograd.grad(y, (x, u, v, coefficients), torch.ones_like(y))

        return call

    timings = measure_in_turn({"gather": step("gather"), "dense": step("dense")}, rounds=rounds)
    pairs = zip(timings["dense"].samples, timings["gather"].samples, strict=True)
    ratios = sorted(dense / gather for dense, gather in pairs)
    return {
        "tokens": tokens,
        "atoms": atoms,
        "width": width,
        "top_k": top_k,
        "gather_ms": timings["gather"].median,
        "dense_ms": timings["dense"].median,
        "dense_over_gather": round(ratios[len(ratios) // 2], 3),
    }


def _crossover(dense_over_gather: list[float]) -> float:
    """K / M at which the two cost the same, between the measured ratios; above 1 where gathering always wins."""
    if dense_over_gather[0] < 1:
        return RATIOS[0]
    for (low, high), (before, after) in zip(pairwise(RATIOS), pairwise(dense_over_gather), strict=False):
        if before >= 1 > after:
            return round(low + (high - low) * (before - 1) / (before - after), 3)
    return 2.0
