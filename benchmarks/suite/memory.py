"""Peak memory of a training step of the DSC layer alone, against the published formulation.

Each step runs in a fresh process: resident high-water mark of forward, backward and regularisers, less what was
resident with the layer and its input in place. The published formulation is also computed from the sizes of its
tensors, since it may not fit; a smaller point where both fit shows how far the formula can be trusted.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from benchmarks.case import Benchmark, Cases, MemoryCase, Settings
from benchmarks.peak import extra_bytes
from torchdsc import DSC

from .published import PublishedLayer
from .steps import FLOAT, training_call

TESTS = ("tests/ops", "tests/nn", "tests/test_losses.py")
SMALL = {"tokens": 1024, "d": 1024, "M": 4096, "K": 16}
LARGE = {"tokens": 8192, "d": 1024, "M": 16384, "K": 64}
_QUICK = {"tokens": 512, "d": 128, "M": 1024, "K": 16}
# Of the memory that is available, the share that a step may be expected to take.
_SHARE = 0.8


def _cases(settings: Settings) -> Cases:
    for sizes in (_QUICK,) if settings.quick else (SMALL, LARGE):
        computed = published_terms(**sizes)
        steps, left_out = {"dsc": f"{__name__}:dsc_step"}, {}
        needed, available = sum(computed.values()), available_bytes(settings.device)
        if needed <= _SHARE * available:
            steps["published"] = f"{__name__}:published_step"
        else:
            left_out["published"] = (
                f"would take {needed / 2**30:.1f} GiB of the {available / 2**30:.1f} GiB that are available: computed"
            )
        yield MemoryCase(dict(sizes), steps, subject="dsc", computed={"published": computed}, left_out=left_out)
    return None


def published_terms(tokens: int, d: int, M: int, K: int) -> dict[str, int]:
    """Bytes of the float32 tensors that are alive where a training step of the published formulation peaks, by term.

    From the forward pass on these are kept for the backward pass:

    * logits before and after the clamp, and their softmax: 3 tokens M
    * the gathered rows of both banks: 2 tokens K d
    * both normalised banks: 2 M d
    * the normed input, and the composed output before gamma: 2 tokens d
    * 1 - identity matrix, and the masked Gram matrix of each bank: 3 M M

    On top of them comes the largest of what is passing:

    * the norm of a Gram matrix backwards, its gradient in two steps: 2 M M
    * the second Gram matrix before its mask, beside the scores: M M + tokens M
    * a gather backwards, when the Gram matrices are gone: tokens K d - 3 M M

    Coefficients, vectors of M or tokens entries, and gradients of the banks are left out.
    """
    square, gathered, logits = M * M, tokens * K * d, tokens * M
    sizes = {
        "logits": 3 * logits,
        "gathered rows": 2 * gathered,
        "normalised banks": 2 * M * d,
        "normed input and output": 2 * tokens * d,
        "Gram matrices": 3 * square,
        "passing": max(2 * square, square + logits, gathered - 3 * square),
    }
    return {name: FLOAT * size for name, size in sizes.items()}


def dsc_step(**sizes: int) -> int:
    """Bytes that a training step of the library's layer takes; for a process of its own."""
    return _step(lambda d, M, K: DSC(d, num_atoms=M, top_k=K), **sizes)


def published_step(**sizes: int) -> int:
    """Bytes that a training step of the published formulation takes; for a process of its own."""
    return _step(lambda d, M, K: PublishedLayer(d, M, K, 0), **sizes)


def _step(build: Callable[[int, int, int], nn.Module], *, tokens: int, d: int, M: int, K: int) -> int:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    layer, x = build(d, M, K).to(device), torch.randn(tokens, d, device=device)
    # A step of no size first, and a product: code, threads and buffers of the libraries are none of the step's.
    training_call(build(16, 32, 4).to(device), torch.randn(64, 16, device=device))()
    warm = torch.randn(1024, 1024, device=device)
    warm @ warm
    del warm
    # A memory figure that cannot be had is a failure here, not a gap.
    taken = extra_bytes(training_call(layer, x))
    if taken is None:
        raise RuntimeError("the resident high-water mark must be resettable (/proc/self/clear_refs), and is not here")
    return taken


def available_bytes(device: str) -> int:
    """Memory that a new process could take."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/meminfo must name MemAvailable, and does not")


MEMORY = Benchmark("memory", "peak memory of a training step of the DSC layer alone", TESTS, _cases)
