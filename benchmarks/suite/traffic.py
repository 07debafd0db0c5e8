"""What the layer reads as it grows: d and M in the paper's proportion, counted and timed for each router.

The paper tells a token's traffic as O(K d), which leaves the router out. Counted are the bytes of parameters that a
forward pass has to read: those of the router, and the rows of the bank that its tokens select, each once.
"""

from collections.abc import Callable
from math import isqrt

import torch
from torch import Tensor

from benchmarks.case import Benchmark, Case, Cases, Settings
from torchdsc import DSC
from torchdsc.ops import ngram_codes

from .layer import Sizes
from .steps import FLOAT

WIDTHS = (96, 192, 384, 768)
TOKENS = (1, 4096)
# The one of the paper, and those that read less.
ROUTERS = ("linear", "low_rank", "product_key", "ngram")
_ORDERS = (1, 2, 3, 4)
_VOCABULARY = 4096


def _cases(settings: Settings) -> Cases:
    counted = []
    for width in WIDTHS[:2] if settings.quick else WIDTHS:
        for tokens in TOKENS[:1] if settings.quick else TOKENS:
            calls: dict[str, Callable[[], object]] = {}
            for router in ROUTERS:
                torch.manual_seed(0)
                layer, x, seen = _layer(width, router, tokens, settings.device)
                point = {"d": width, "M": layer.options.num_atoms, "router": router, "tokens": tokens}
                counted.append(point | read_bytes(layer, seen))
                calls[router] = _forward_call(layer, x, seen)
            yield Case({"d": width, "tokens": tokens}, calls, subject=ROUTERS[0])
    return {"counted": counted}


def _layer(width: int, router: str, tokens: int, device: str) -> tuple[DSC, Tensor, Tensor]:
    """A layer in the paper's proportions, random tokens, and what its router sees of them."""
    sizes = Sizes().scaled(width, Sizes().top_k)
    num_atoms = isqrt(sizes.num_atoms) ** 2 if router == "product_key" else sizes.num_atoms
    by_ngrams = router == "ngram"
    layer = DSC(width, num_atoms=num_atoms, top_k=sizes.top_k, router=router, device=device).eval()
    x = torch.randn(tokens, width, device=device)
    return layer, x, ngram_codes(torch.randint(_VOCABULARY, (tokens,), device=device), _ORDERS) if by_ngrams else x


@torch.no_grad()
def read_bytes(layer: DSC, seen: Tensor) -> dict[str, int]:
    """Bytes of parameters that a forward pass has to read: the router's, and the selected rows of both banks."""
    rows = layer.route(seen).indices.unique().numel()
    router = sum(parameter.numel() for parameter in layer.router.parameters())
    atoms = rows * (layer.in_features + layer.out_features)
    return {"router_bytes": FLOAT * router, "atom_bytes": FLOAT * atoms}


def _forward_call(layer: DSC, x: Tensor, seen: Tensor) -> Callable[[], object]:
    @torch.no_grad()
    def forward() -> object:
        return layer(x, router_input=seen)

    return forward


TRAFFIC = Benchmark("traffic", "bytes that the layer reads as d and M grow in proportion", ("tests/nn",), _cases)
