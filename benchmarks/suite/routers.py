"""Routers that cost less than the layer they steer, and banks of a thousand to a million atoms."""

from math import isqrt

import torch
from torch import Tensor, nn

from benchmarks.case import Benchmark, Case, Cases, Settings
from torchdsc import DSC
from torchdsc.baselines import DenseFFN

from .layer import KINDS, Sizes
from .older import Residual
from .published import PublishedLayer
from .steps import forward_call, training_call

ROUTERS = ("low_rank", "product_key")
ATOMS = (1 << 10, 1 << 14, 1 << 18, 1 << 20)
TESTS = ("tests/ops", "tests/nn")
# What the frame term of a bank is estimated from where gradients are row-sparse.
_FRAME_SAMPLES = 1024


def _cases(settings: Settings) -> Cases:
    torch.manual_seed(0)
    x = torch.randn(64 if settings.quick else 4096, Sizes().width, device=settings.device)
    for router in ROUTERS:
        yield from _beside_static(router, x)
    yield from _atoms(ATOMS[:2] if settings.quick else ATOMS, x)
    return None


def _beside_static(router: str, x: Tensor) -> Cases:
    """The layer of the paper's size with a router, against the linear one, Dense and the published formulation."""
    sizes = Sizes()
    num_atoms = isqrt(sizes.num_atoms) ** 2 if router == "product_key" else sizes.num_atoms
    modules: dict[str, nn.Module] = {
        "dense": DenseFFN(sizes.width, sizes.dense),
        router: _layer(sizes, num_atoms=num_atoms, router=router),
        "linear": _layer(sizes, num_atoms=sizes.num_atoms),
        "published": PublishedLayer(sizes.width, sizes.num_atoms, sizes.top_k, sizes.static),
    }
    for kind in KINDS:
        make = forward_call if kind == KINDS[0] else training_call
        calls = {name: make(module.to(x.device), x) for name, module in modules.items()}
        point: dict[str, int | str] = {"router": router, "tokens": x.shape[0], "M": num_atoms, "kind": kind}
        yield Case(point, calls, subject=router)
    return None


def _layer(sizes: Sizes, **options: int | str) -> nn.Module:
    return Residual(DenseFFN(sizes.width, sizes.static), DSC(sizes.width, top_k=sizes.top_k, **options))


def _atoms(counts: tuple[int, ...], x: Tensor) -> Cases:
    """Product keys without a static layer, over the number of atoms; in training with row-sparse gradients."""
    layers = {
        count: DSC(
            x.shape[1],
            num_atoms=count,
            top_k=Sizes().top_k,
            router="product_key",
            sparse_gradients=True,
            frame_samples=_FRAME_SAMPLES,
            frame_normalized=True,
            device=x.device,
        )
        for count in counts
    }
    for kind in KINDS:
        make = forward_call if kind == KINDS[0] else training_call
        calls = {str(count): make(layer, x) for count, layer in layers.items()}
        point: dict[str, int | str] = {"router": "product_key", "tokens": x.shape[0], "M": counts[-1], "kind": kind}
        yield Case(point, calls, subject=str(counts[-1]))
    return None


ROUTERS_BENCHMARK = Benchmark("routers", "cheaper routers, and product keys over up to a million atoms", TESTS, _cases)
