"""Each compiled function against the tensor operations that stand in for it, and against what torch.compile makes.

With one thread and two, and where the processor has AVX-512 also in a process of its own that may not use it.
"""

import math
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from itertools import product
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks import child, runner
from benchmarks.case import Benchmark, Case, Cases, Row, Settings
from benchmarks.ceilings import measure_ceilings
from torchdsc.ops import gate, native, product_key, short_convolution
from torchdsc.ops.compose import gather, reference
from torchdsc.ops.route import screened

# Functions under the names of these modules.
_gate: Any = import_module("torchdsc.ops.gate")
_select: Any = import_module("torchdsc.ops.select")
_convolution: Any = import_module("torchdsc.ops.short_convolution")

Calls = dict[str, Callable[[], object]]
INFERENCE, TRAINING = "inference", "training"
COMPILED, TENSORS, INDUCTOR = "compiled", "tensor operations", "torch.compile"
# What sets the instructions that torch, its matrix products and the compiled functions use.
WITHOUT_AVX512 = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"}
_ROUNDS = 12
_CLAMP, _EPS, _SEQUENCE = 20.0, 1e-6, 64
# Sizes that are cut down to see that everything runs.
_QUICK = {"tokens": 64, "M": 256}

# Of the layer as recommended at both sizes, and as in the paper.
_LARGE, _PAPER, _SMALL = {"d": 384, "M": 1551, "K": 32}, {"d": 384, "M": 1523, "K": 4}, {"d": 128, "M": 575, "K": 32}
_MANY = {"tokens": 4096}
_CONVOLUTIONS = ({"d": 384, "w": 3}, {"d": 384, "w": 4}, {"d": 128, "w": 3})
POINTS: tuple[tuple[str, str, Mapping[str, int]], ...] = (
    *(("gate", INFERENCE, {"tokens": 1, "K": top_k}) for top_k in (4, 32)),
    *(("compose", INFERENCE, {"tokens": tokens, **_LARGE}) for tokens in (1, 64)),
    *(("compose", kind, _MANY | sizes) for kind in (INFERENCE, TRAINING) for sizes in (_LARGE, _PAPER, _SMALL)),
    *(("select", TRAINING, _MANY | sizes) for sizes in (_LARGE, _PAPER, _SMALL)),
    *(("top-K", INFERENCE, {"tokens": tokens, **_LARGE}) for tokens in (1, 64)),
    ("top-K", INFERENCE, _MANY | _PAPER),
    *(("product keys", INFERENCE, {"tokens": tokens, "M": 1 << 14, "K": 4}) for tokens in (1, 64, 4096)),
    ("screening", INFERENCE, {"tokens": 64, **_LARGE}),
    *(("screening", INFERENCE, _MANY | sizes) for sizes in (_LARGE, _PAPER)),
    *(("short convolution", INFERENCE, {"tokens": tokens, **_CONVOLUTIONS[0]}) for tokens in (1, 64)),
    *(("short convolution", kind, _MANY | sizes) for kind in (INFERENCE, TRAINING) for sizes in _CONVOLUTIONS),
)


def _cases(settings: Settings) -> Cases:
    yield from _own_cases(settings)
    if settings.quick or not torch.backends.cpu.get_cpu_capability().startswith("AVX512"):
        return None
    with _environment(WITHOUT_AVX512):
        return {"without_avx512": child.call("benchmarks.suite.compiled:rows", {})}


def rows() -> list[Row]:
    """Every case measured with the instructions of this process."""
    settings, ceilings = Settings(), measure_ceilings("cpu")
    return [runner.measure(case, settings, _ROUNDS, ceilings) for case in _own_cases(settings)]


def _own_cases(settings: Settings) -> Iterator[Case]:
    if native.module_for() is None or settings.device != "cpu":
        raise ValueError("compiled must run on a CPU with the compiled functions built, which is not so here")
    points = [point for point in POINTS if point[0] != "screening" or native.has_bfloat16()]
    before = torch.get_num_threads()
    try:
        # A compiler's cache may hold functions that were made for other instructions.
        with TemporaryDirectory() as folder, _environment({"TORCHINDUCTOR_CACHE_DIR": folder}):
            for threads, (function, kind, sizes) in product((1, 2), points):
                torch.set_num_threads(threads)
                torch.manual_seed(0)
                yield _case(threads, function, kind, dict(sizes), quick=settings.quick)
    finally:
        torch.set_num_threads(before)


def _case(threads: int, function: str, kind: str, sizes: dict[str, int], *, quick: bool) -> Case:
    point: dict[str, int | str] = {"function": function, "pass": kind, "threads": threads, **sizes}
    if quick:
        sizes = {name: min(size, _QUICK.get(name, size)) for name, size in sizes.items()}
    calls = _FUNCTIONS[function](kind, **sizes)
    # It builds another function for each number of threads, and each takes seconds.
    reason = "with one thread alone" if quick or threads > 1 else _refusal(calls[INDUCTOR])
    if reason is None:
        return Case(point, calls, subject=COMPILED)
    del calls[INDUCTOR]
    return Case(point, calls, subject=COMPILED, left_out={INDUCTOR: reason})


def _gate_calls(kind: str, *, tokens: int, K: int) -> Calls:
    logits = torch.randn(tokens, K)
    arguments = logits, _CLAMP, _EPS, "sum"
    compiled = _inductor(_gate._gate_by_tensors)
    return _without_gradients(
        {
            COMPILED: lambda: gate(logits),
            TENSORS: lambda: _gate._gate_by_tensors(*arguments),
            INDUCTOR: lambda: compiled(*arguments),
        }
    )


def _compose_calls(kind: str, *, tokens: int, d: int, M: int, K: int) -> Calls:
    x, u, v, indices, coefficients = _selected(tokens, d, M, K)
    grad = torch.randn(tokens, d)

    def both(forward: Callable[..., Any], backward: Callable[..., Any]) -> Callable[[], object]:
        def call() -> object:
            y, latent = forward(x, u, v, indices, coefficients, _EPS)
            return y if kind == INFERENCE else backward(grad, x, u, v, indices, coefficients, latent, _EPS)

        return call

    return _without_gradients(
        {
            COMPILED: both(gather.forward, gather.backward),
            TENSORS: both(gather._forward_by_tensors, gather._backward_by_tensors),
            INDUCTOR: both(_inductor(reference.forward), _inductor(reference.backward)),
        }
    )


def _select_calls(kind: str, *, tokens: int, d: int, M: int, K: int) -> Calls:
    logits, grad = torch.randn(tokens, M, requires_grad=True), torch.empty(tokens, M)
    gradients = torch.randn(tokens, K), torch.randn(tokens), torch.randn(M)

    def one_after_another(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        clamped = logits.clamp(-_CLAMP, _CLAMP)
        return clamped.topk(K)[0], clamped.logsumexp(-1), clamped.softmax(-1).sum(0)

    def compiled() -> object:
        _, indices, normalizer, _ = _select.select_forward(logits, None, K, _CLAMP)
        return _select.select_backward(logits, None, indices, normalizer, *gradients, _CLAMP, out=grad)

    def tensors() -> object:
        _, indices, normalizer, _ = _select._forward_by_tensors(logits, None, K, _CLAMP)
        return _select._backward_by_tensors(logits, None, indices, normalizer, *gradients, _CLAMP, grad)

    by_inductor = _inductor(one_after_another)
    calls = _without_gradients({COMPILED: compiled, TENSORS: tensors})
    return calls | {INDUCTOR: lambda: torch.autograd.grad(by_inductor(logits), logits, gradients)}


def _largest_calls(kind: str, *, tokens: int, d: int, M: int, K: int) -> Calls:
    logits = torch.randn(tokens, M)
    by_inductor = _inductor(lambda logits: logits.topk(K))
    return _without_gradients(
        {
            COMPILED: lambda: _select.largest(logits, K),
            TENSORS: lambda: logits.topk(K),
            INDUCTOR: lambda: by_inductor(logits),
        }
    )


def _product_key_calls(kind: str, *, tokens: int, M: int, K: int) -> Calls:
    left, right = torch.randn(2, tokens, 1, math.isqrt(M))
    arguments = left, right, K, _CLAMP / 2
    by_inductor = _inductor(product_key._top_sums)
    return _without_gradients(
        {
            COMPILED: lambda: product_key._top_sums_untraced(*arguments),
            TENSORS: lambda: product_key._top_sums(*arguments),
            INDUCTOR: lambda: by_inductor(*arguments),
        }
    )


def _screening_calls(kind: str, *, tokens: int, d: int, M: int, K: int) -> Calls:
    x, weight = torch.randn(tokens, d), torch.randn(M, d)

    def whole(x: Tensor, weight: Tensor) -> object:
        return functional.linear(x, weight).topk(K)

    by_inductor = _inductor(whole)
    return _without_gradients(
        {
            COMPILED: lambda: screened.forward(x, weight, None, K),
            TENSORS: lambda: whole(x, weight),
            # The same product, with the compiled function for its top-K.
            "float32 and compiled top-K": lambda: _select.largest(functional.linear(x, weight), K),
            INDUCTOR: lambda: by_inductor(x, weight),
        }
    )


def _convolution_calls(kind: str, *, tokens: int, d: int, w: int) -> Calls:
    # One new token is decoded from the w that it sees.
    sequences, num_tokens, length = (1, w, 1) if tokens == 1 else (tokens // _SEQUENCE, _SEQUENCE, _SEQUENCE)
    weight = torch.randn(w, d, requires_grad=True)
    x, grad = torch.randn(sequences, num_tokens, d, requires_grad=True), torch.randn(sequences, length, d)
    functions = {
        COMPILED: short_convolution,
        TENSORS: _convolution._by_tensors,
        "tensor operations, own gradient": _OwnGradient.apply,
        "conv1d": _conv1d,
        INDUCTOR: _inductor(_convolution._by_tensors),
    }
    if kind == INFERENCE:
        del functions["tensor operations, own gradient"]
        return _without_gradients({name: partial(f, x, weight, length) for name, f in functions.items()})

    def training(function: Callable[..., Tensor]) -> Callable[[], object]:
        return lambda: torch.autograd.grad(function(x, weight, length), (x, weight), grad)

    return {name: training(function) for name, function in functions.items()}


class _OwnGradient(torch.autograd.Function):
    """The quickest tensor operations for a gradient that were found; autograd makes a copy for each tap."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, length: int) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _convolution._by_tensors(x, weight, length)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        (grad,), (x, weight) = grads, ctx.saved_tensors
        dx, dweight = grad * weight[0], torch.empty_like(weight)
        for distance in range(weight.shape[0]):
            later, earlier = grad[..., distance:, :], x[..., : x.shape[-2] - distance, :]
            if distance:
                dx[..., : x.shape[-2] - distance, :].addcmul_(later, weight[distance])
            dweight[distance] = (later * earlier).flatten(0, -2).sum(0)
        return dx, dweight, None


def _conv1d(x: Tensor, weight: Tensor, length: int) -> Tensor:
    w, d = weight.shape
    kernel = weight.flip(0).t().unsqueeze(1)
    y: Tensor = functional.conv1d(x.mT, kernel, padding=w - 1, groups=d)[..., : x.shape[-2]].mT
    return y[..., x.shape[-2] - length :, :]


_FUNCTIONS: dict[str, Callable[..., Calls]] = {
    "gate": _gate_calls,
    "compose": _compose_calls,
    "select": _select_calls,
    "top-K": _largest_calls,
    "product keys": _product_key_calls,
    "screening": _screening_calls,
    "short convolution": _convolution_calls,
}


def _selected(tokens: int, d: int, M: int, K: int) -> tuple[Tensor, ...]:
    return torch.randn(tokens, d), *torch.randn(2, M, d), torch.randint(M, (tokens, K)), torch.rand(tokens, K)


def _without_gradients(calls: Calls) -> Calls:
    return {name: torch.no_grad()(call) for name, call in calls.items()}


def _inductor(function: Callable[..., Any]) -> Callable[..., Any]:
    torch.compiler.reset()
    return torch.compile(function, dynamic=False)


def _refusal(call: Callable[[], object]) -> str | None:
    """Why torch.compile makes no function, as without a C++ compiler; None where it does."""
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0][:100]}"
    return None


@contextmanager
def _environment(changes: Mapping[str, str]) -> Iterator[None]:
    """Variables of the environment, for processes that are started meanwhile."""
    before = dict(os.environ)
    os.environ.update(changes)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


COMPILED_BENCHMARK = Benchmark(
    "compiled",
    "each compiled function against tensor operations and torch.compile",
    ("tests/ops/test_native.py", "tests/ops/test_short_convolution.py"),
    _cases,
    usual=False,
)
