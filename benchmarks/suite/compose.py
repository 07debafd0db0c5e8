"""The operation by each implementation against the published gathers, over tokens, M, K and d."""

from collections.abc import Callable
from itertools import product

import torch
from torch import Tensor

from benchmarks.case import Benchmark, Case, Cases, Floor, Settings
from torchdsc.ops import compose
from torchdsc.ops.compose import choose_implementation

from .published import published_compose
from .steps import FLOAT, too_large

TOKENS, ATOMS, TOP_K, WIDTHS = (1, 64, 1024, 4096), (1523, 16384), (4, 16, 64), (384, 1024)
KINDS = ("forward", "forward+backward")
# The sizes around which one at a time is varied.
BASE = {"tokens": 1024, "M": ATOMS[0], "K": TOP_K[0], "d": WIDTHS[0]}


def _cases(settings: Settings) -> Cases:
    tokens, atoms, top_k, widths = (
        ((1, 64), (256, 512), (4, 16), (32,)) if settings.quick else (TOKENS, ATOMS, TOP_K, WIDTHS)
    )
    grid = list(product(widths, atoms, top_k, tokens))
    if not settings.quick and settings.device == "cpu":
        # One size at a time, and all of them large: the whole grid takes more than an hour on a few cores.
        base = tuple(BASE[size] for size in ("d", "M", "K", "tokens"))
        grid = [sizes for sizes in grid if _differences(sizes, base) <= 1] + [grid[-1]]
    for sizes in grid:
        for kind in KINDS:
            yield _case(*sizes, kind, settings.device)
    return None


def _differences(sizes: tuple[int, ...], base: tuple[int, ...]) -> int:
    return sum(size != usual for size, usual in zip(sizes, base, strict=True))


def _case(width: int, atoms: int, top_k: int, tokens: int, kind: str, device: str) -> Case:
    generator = torch.Generator(device).manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device, generator=generator)

    x, u, v = random(tokens, width), random(atoms, width), random(atoms, width)
    indices, coefficients = random(tokens, atoms).topk(top_k).indices, random(tokens, top_k).abs()
    distinct = torch.unique(indices).numel()
    implementations: dict[str, Callable[..., Tensor]] = {
        "gather": lambda *arguments: compose(*arguments, impl="gather"),
        "dense": lambda *arguments: compose(*arguments, impl="dense"),
        "published": published_compose,
    }
    if device == "cuda":
        implementations["triton"] = lambda *arguments: compose(*arguments, impl="triton")
    make = _forward if kind == KINDS[0] else _training
    calls, left_out = {}, {}
    for name, function in implementations.items():
        reason = too_large(_working_bytes(name, tokens, atoms, top_k, width, kind))
        if reason is None:
            calls[name] = make(function, x, u, v, indices, coefficients)
        else:
            left_out[name] = reason
    return Case(
        {"tokens": tokens, "M": atoms, "K": top_k, "d": width, "kind": kind},
        calls,
        # What a user gets without asking.
        subject=choose_implementation(tokens, atoms, top_k, width, device),
        floor=_floor(tokens, atoms, top_k, width, distinct, kind),
        left_out=left_out,
    )


def _working_bytes(name: str, tokens: int, atoms: int, top_k: int, width: int, kind: str) -> int:
    """Size of the tensors that grow with tokens x K x d or tokens x M; in training their gradients as well."""
    sizes = {"published": 2 * tokens * top_k * width, "dense": 2 * tokens * atoms}
    return FLOAT * sizes.get(name, 0) * (1 if kind == KINDS[0] else 2)


def _floor(tokens: int, atoms: int, top_k: int, width: int, distinct: int, kind: str) -> Floor:
    """Tokens, selections and the distinct selected rows once each; backwards the banks' gradients, which are dense."""
    pairs, rows, vectors = tokens * top_k, 2 * distinct * width, tokens * width
    forward = FLOAT * (2 * vectors + rows + pairs) + 8 * pairs
    if kind == KINDS[0]:
        return Floor(forward, 4 * pairs * width)
    backward = FLOAT * (3 * vectors + rows + 3 * pairs + 2 * atoms * width) + 8 * pairs
    return Floor(forward + backward, 12 * pairs * width)


def _forward(function: Callable[..., Tensor], *arguments: Tensor) -> Callable[[], object]:
    @torch.no_grad()
    def call() -> object:
        return function(*arguments)

    return call


def _training(
    function: Callable[..., Tensor], x: Tensor, u: Tensor, v: Tensor, indices: Tensor, coefficients: Tensor
) -> Callable[[], object]:
    x, u, v, coefficients = (tensor.detach().clone().requires_grad_() for tensor in (x, u, v, coefficients))

    def call() -> object:
        y = function(x, u, v, indices, coefficients)
        return torch.autograd.grad(y, (x, u, v, coefficients), torch.ones_like(y))

    return call


COMPOSE = Benchmark("compose", "the composition by each implementation against gathers", ("tests/ops/compose",), _cases)
