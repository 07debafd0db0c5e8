"""The feed-forward layer: DSC against Dense, its floor, MoE, Mixture-of-LoRAs and the published formulation.

Forward, and forward with backward and regularisers, where the frame term is counted once a step on both sides.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.case import Benchmark, Case, Cases, Floor, Settings
from torchdsc import DSC
from torchdsc.baselines import DenseFFN, MixtureOfLoRAs, StandardMoE

from .older import Residual
from .published import PublishedLayer
from .steps import FLOAT, forward_call, training_call

TOKENS = (1, 256, 4096)
KINDS = ("forward", "forward+backward")
EXPERT_KERNELS = ("eager", "grouped_mm", "batched_mm")
# Why batched_mm is left out beyond one token.
GATHERS_EXPERTS = "gathers whole experts for every token"
TESTS = ("tests/ops", "tests/nn", "tests/baselines", "tests/test_losses.py")


@dataclass(frozen=True)
class Sizes:
    """Widths at equal parameters: d, M, K, the static layer beside DSC, Dense, and one of five experts."""

    width: int = 384
    num_atoms: int = 1523
    top_k: int = 4
    static: int = 327
    dense: int = 2611
    expert: int = 545

    def scaled(self, width: int, top_k: int) -> "Sizes":
        """The same proportions at another d."""
        factor = width / self.width
        others = (round(size * factor) for size in (self.static, self.dense, self.expert))
        return Sizes(width, round(self.num_atoms * factor), top_k, *others)

    def floor(self, tokens: int, kind: str) -> Floor:
        """The DSC layer's: router, static layer and selected atoms; in training their gradients and L_frame's."""
        selected = min(tokens * self.top_k, self.num_atoms)
        always = self.width * self.num_atoms + 2 * self.width * self.static
        weights = always + 2 * selected * self.width
        operations = 2 * tokens * (always + 2 * self.top_k * self.width)
        moved = weights + 2 * tokens * self.width
        if kind == "forward":
            return Floor(FLOAT * moved, operations)
        # Two more products each; the smaller Gram matrix of each side, forwards and back; both banks' gradients whole.
        gram = 2 * 4 * min(self.num_atoms, self.width) * self.num_atoms * self.width
        banks = 2 * self.num_atoms * self.width
        return Floor(FLOAT * (2 * always + 2 * banks + 4 * tokens * self.width), 3 * operations + gram)


class ProductsAlone(nn.Module):
    """The matrix products of the DSC layer alone: router, and the static layer without its activation."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.router = nn.Linear(sizes.width, sizes.num_atoms, bias=False)
        self.up = nn.Linear(sizes.width, sizes.static, bias=False)
        self.down = nn.Linear(sizes.static, sizes.width, bias=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.router(x), self.down(self.up(x))


def _paper(settings: Settings) -> Cases:
    yield from _cases(Sizes(), (1, 64) if settings.quick else TOKENS, settings.device)
    return None


def _sweep(settings: Settings) -> Cases:
    widths, tokens = ((64,), (1, 64)) if settings.quick else ((384, 1024, 2048), TOKENS)
    for width, top_k in product(widths, (4, 16)):
        yield from _cases(Sizes().scaled(width, top_k), tokens, settings.device)
    return None


def _cases(sizes: Sizes, all_tokens: tuple[int, ...], device: str) -> Cases:
    torch.manual_seed(0)
    for tokens, kind in product(all_tokens, KINDS):
        layers = {name: layer.to(device) for name, layer in _layers(sizes).items()}
        left_out = {}
        if tokens > 1:
            del layers["moe (batched_mm)"]
            left_out["moe (batched_mm)"] = GATHERS_EXPERTS
        x = torch.randn(tokens, sizes.width, device=device)
        make: Callable[[nn.Module, Tensor], Callable[[], object]] = forward_call if kind == KINDS[0] else training_call
        point: dict[str, int | str] = {
            "tokens": tokens,
            "kind": kind,
            "d": sizes.width,
            "M": sizes.num_atoms,
            "K": sizes.top_k,
        }
        calls = {name: make(layer, x) for name, layer in layers.items()}
        yield Case(point, calls, subject="dsc", floor=sizes.floor(tokens, kind), left_out=left_out)
    return None


def _layers(sizes: Sizes) -> dict[str, nn.Module]:
    width, static = sizes.width, sizes.static
    kernels: tuple[Any, ...] = EXPERT_KERNELS
    moes = {f"moe ({kernel})": StandardMoE(width, sizes.expert, 5, 2, impl=kernel) for kernel in kernels}
    loras = MixtureOfLoRAs(width, num_experts=sizes.num_atoms, rank=1, top_k=sizes.top_k)
    dsc = DSC(width, num_atoms=sizes.num_atoms, top_k=sizes.top_k)
    return {
        "dense": DenseFFN(width, sizes.dense),
        "floor": ProductsAlone(sizes),
        "dsc": Residual(DenseFFN(width, static), dsc),
        **moes,
        "mixture_of_loras": Residual(DenseFFN(width, static), loras),
        "published": PublishedLayer(width, sizes.num_atoms, sizes.top_k, static),
    }


LAYER = Benchmark("layer", "one feed-forward layer of the paper's size against its baselines", TESTS, _paper)
LAYER_SWEEP = Benchmark("layer_sweep", "the layer at wider d and larger K, in proportion", TESTS, _sweep, usual=False)
