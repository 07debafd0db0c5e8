"""The feed-forward layer of the paper's size: DSC against Dense, its floor, MoE and the published formulation.

Forward, and forward with backward and regularisers, where the frame term is counted once a step on both sides.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from torchdsc import DSC, DSCResidual, regularization
from torchdsc.baselines import DenseFFN, MixtureOfLoRAs, StandardMoE
from torchdsc.lab.latency import Timing, measure_in_turn

from .published import PublishedLayer

FEATURES, NUM_ATOMS, TOP_K, STATIC, DENSE = 384, 1523, 4, 327, 2611
ROUNDS = {1: 300, 256: 40, 4096: 12}
EXPERT_KERNELS = ("eager", "grouped_mm", "batched_mm")


class Floor(nn.Module):
    """The matrix products of the DSC layer alone: router, and the static layer without its activation."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(FEATURES, NUM_ATOMS, bias=False)
        self.up = nn.Linear(FEATURES, STATIC, bias=False)
        self.down = nn.Linear(STATIC, FEATURES, bias=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.router(x), self.down(self.up(x))


def measure(rounds: int) -> dict[str, Any]:
    """Time every layer at 1, 256 and 4096 tokens."""
    torch.manual_seed(0)
    rows = []
    for tokens, usual in ROUNDS.items():
        layers = _layers(tokens)
        x = torch.randn(tokens, FEATURES)
        for kind in ("forward", "forward+backward"):
            calls = {name: _call(layer, x, kind) for name, layer in layers.items()}
            timings = measure_in_turn(calls, rounds=rounds or usual, warmup=3)
            rows += _rows(tokens, kind, timings)
    return {
        "sizes": {"d": FEATURES, "num_atoms": NUM_ATOMS, "top_k": TOP_K, "static": STATIC, "dense": DENSE},
        "rows": rows,
    }


def _layers(tokens: int) -> dict[str, nn.Module]:
    kernels = [kernel for kernel in EXPERT_KERNELS if kernel != "batched_mm" or tokens == 1]
    moes = {f"moe ({kernel})": StandardMoE(FEATURES, 545, 5, 2, impl=kernel) for kernel in kernels}  # type: ignore[arg-type]
    loras = MixtureOfLoRAs(FEATURES, num_experts=NUM_ATOMS, rank=1, top_k=TOP_K)
    return {
        "dense": DenseFFN(FEATURES, DENSE),
        "floor": Floor(),
        "dsc": DSCResidual(DenseFFN(FEATURES, STATIC), DSC(FEATURES, num_atoms=NUM_ATOMS, top_k=TOP_K)),
        **moes,
        "mixture_of_loras": DSCResidual(DenseFFN(FEATURES, STATIC), loras),
        "published": PublishedLayer(FEATURES, NUM_ATOMS, TOP_K, STATIC),
    }


def _call(layer: nn.Module, x: Tensor, kind: str) -> Callable[[], object]:
    if kind == "forward":
        layer.eval()

        @torch.no_grad()
        def forward() -> object:
            return layer(x)

        return forward
    layer.train()
    leaf = x.clone().requires_grad_()

    def step() -> None:
        if isinstance(layer, Floor):
            outputs = layer(leaf)
            torch.autograd.backward(outputs, [torch.ones_like(y) for y in outputs])
        elif isinstance(layer, PublishedLayer):
            y, regularizers = layer(leaf, regularize=True)
            (y.sum() + regularizers).backward()
        else:
            loss = layer(leaf).sum()
            if not isinstance(layer, DenseFFN):
                loss = loss + regularization(layer).total
            loss.backward()
        layer.zero_grad()
        leaf.grad = None

    return step


def _rows(tokens: int, kind: str, timings: dict[str, Timing]) -> list[dict[str, Any]]:
    """Each layer's time, and the median over rounds of DSC's time over its."""
    own = timings["dsc"].samples
    rows = []
    for name, timing in timings.items():
        ratios = sorted(a / b for a, b in zip(own, timing.samples, strict=True))
        quarter = len(ratios) // 4
        row = {
            "tokens": tokens,
            "kind": kind,
            "layer": name,
            "ms": [round(value, 4) for value in (timing.q1, timing.median, timing.q3)],
            "dsc_over_it": round(ratios[len(ratios) // 2], 3),
            "quartiles": [round(ratios[quarter], 3), round(ratios[-quarter - 1], 3)],
        }
        rows.append(row)
        print(f"{tokens:5d} {kind:17s} {name:18s} {timing.median:9.3f} ms  dsc/it {row['dsc_over_it']:.2f}")
    return rows
