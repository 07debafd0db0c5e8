"""Selection with the training statistics in one pass, against clamp, topk, softmax and logsumexp one after another."""

from collections.abc import Callable
from itertools import product

import torch
from torch import Tensor

from benchmarks.case import Benchmark, Case, Cases, Floor, Settings
from torchdsc.ops import select

from .steps import FLOAT

TOKENS, ATOMS, TOP_K = (1, 256, 4096), (1523, 16384), (4, 64)
KINDS = ("forward", "forward+backward")
_CLAMP = 20.0


def _cases(settings: Settings) -> Cases:
    sizes = product((1, 64), (256,), (4,)) if settings.quick else product(TOKENS, ATOMS, TOP_K)
    for tokens, atoms, top_k in sizes:
        logits = torch.randn(tokens, atoms, device=settings.device, requires_grad=True)
        functions = {
            "topk alone": lambda logits, top_k: logits.topk(top_k)[:1],
            "select": _selected,
            "published": _published,
        }
        for kind in KINDS:
            make = _forward if kind == KINDS[0] else _training
            calls = {name: make(function, logits, top_k) for name, function in functions.items()}
            passes = 1 if kind == KINDS[0] else 3
            # The logits read, once more backwards, and their gradient written; sums over them as products.
            floor = Floor(passes * FLOAT * tokens * atoms, 2 * passes * tokens * atoms)
            point: dict[str, int | str] = {"tokens": tokens, "M": atoms, "K": top_k, "kind": kind}
            yield Case(point, calls, subject="select", floor=floor)
    return None


def _selected(logits: Tensor, top_k: int) -> tuple[Tensor, ...]:
    selection = select(logits, top_k, logit_clamp=_CLAMP)
    return selection.logits, selection.log_normalizer, selection.probability_sum


def _published(logits: Tensor, top_k: int) -> tuple[Tensor, ...]:
    clamped = logits.clamp(-_CLAMP, _CLAMP)
    return clamped.topk(top_k)[0], clamped.logsumexp(-1), clamped.softmax(-1).sum(0)


def _forward(function: Callable[[Tensor, int], tuple[Tensor, ...]], logits: Tensor, top_k: int) -> Callable[[], object]:
    @torch.no_grad()
    def call() -> object:
        return function(logits, top_k)

    return call


def _training(
    function: Callable[[Tensor, int], tuple[Tensor, ...]], logits: Tensor, top_k: int
) -> Callable[[], object]:
    def call() -> object:
        outputs = function(logits, top_k)
        return torch.autograd.grad(outputs, logits, [torch.ones_like(output) for output in outputs])

    return call


SELECT = Benchmark("select", "top-K with the training statistics in one pass", ("tests/ops/test_select.py",), _cases)
