"""The layer as recommended, K 32, which sees embeddings in its router and input; against MoE and the paper's DSC.

Each MoE is timed on every expert kernel that can be quick at a point, as in the benchmark ``layer``: what ``auto``
takes need not be the fastest.
"""

from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.case import Benchmark, Case, Cases, Settings
from torchdsc import DSC
from torchdsc.baselines import DenseFFN, StandardMoE

from .layer import EXPERT_KERNELS, GATHERS_EXPERTS, KINDS, TESTS, Sizes
from .older import DSCFeedForward, Residual
from .steps import forward_call, training_call

# At the paper's size, and at that of the studies on WikiText-2: M and the static width of K 32 at the budget of K 4.
PAPER = Sizes(), Sizes(384, 1551, 32, 281)
SMALL = Sizes(128, 546, 4, 87, 907, 181), Sizes(128, 575, 32, 41, 907, 181)
# Sequences of this length, as a router's context needs them.
LENGTH = 64
TOKENS = (LENGTH, 4096)


class Recommended(nn.Module):
    """The recommended layer, given its input as embeddings too: what these hold costs nothing here."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.layer = DSCFeedForward(
            sizes.width, sizes.static, num_atoms=sizes.num_atoms, top_k=sizes.top_k, normalize_embeddings=False
        )

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x, x)
        return y


def _cases(settings: Settings) -> Cases:
    torch.manual_seed(0)
    pairs = (SMALL,) if settings.quick else (SMALL, PAPER)
    for (paper, own), tokens, kind in product(pairs, TOKENS[:1] if settings.quick else TOKENS, KINDS):
        layers = {name: layer.to(settings.device) for name, layer in _layers(paper, own).items()}
        # There is no point of one token.
        left_out = {name: GATHERS_EXPERTS for name in layers if name.endswith("(batched_mm)")}
        x = torch.randn(tokens // LENGTH, LENGTH, own.width, device=settings.device)
        make = forward_call if kind == KINDS[0] else training_call
        point: dict[str, int | str] = {
            "tokens": tokens,
            "kind": kind,
            "d": own.width,
            "M": own.num_atoms,
            "K": own.top_k,
        }
        calls = {name: make(layer, x) for name, layer in layers.items() if name not in left_out}
        yield Case(point, calls, subject="recommended", left_out=left_out)
    # Ratios of kernels depend on it, and the processor's name alone does not tell.
    return {"instructions": torch.backends.cpu.get_cpu_capability()}


def _layers(paper: Sizes, own: Sizes) -> dict[str, nn.Module]:
    width = paper.width
    kernels: tuple[Any, ...] = EXPERT_KERNELS
    # What the study of opponents found the best of the kind: more experts of half the width, one of them shared.
    shared = {k: StandardMoE(width, paper.expert // 2, 9, 3, shared_experts=1, impl=k) for k in kernels}
    return {
        "dense": DenseFFN(width, paper.dense),
        **{f"moe ({kernel})": StandardMoE(width, paper.expert, 5, 2, impl=kernel) for kernel in kernels},
        **{f"moe, one shared ({kernel})": moe for kernel, moe in shared.items()},
        "dsc": Residual(DenseFFN(width, paper.static), DSC(width, num_atoms=paper.num_atoms, top_k=paper.top_k)),
        "recommended": Recommended(own),
    }


RECOMMENDED = Benchmark("recommended", "the recommended layer against MoE and the paper's DSC", TESTS, _cases)
