"""The optional compiled functions for a CPU; where they were not built, tensor operations stand in for them."""

from functools import cache
from importlib import import_module
from types import ModuleType

import torch
from torch import Tensor

__all__ = ["FEW_PAIRS", "MOST_SELECTED", "MOST_TAPS", "has_bfloat16", "module_for", "rows_of"]

# Selections up to which calls cost more than their work: decoding, not prefill.
FEW_PAIRS = 64
# The most atoms that the compiled functions select; a general top-k does more, and as quickly.
MOST_SELECTED = 64
# The widest short convolution that they take.
MOST_TAPS = 16
# Builds of the same module, for fewer and fewer processors from the last to the first.
_BUILDS = ("_native_avx512", "_native_avx2", "_native")


def _load() -> ModuleType | None:
    """The build for the instructions that torch itself uses (``ATEN_CPU_CAPABILITY`` sets which), or for fewer."""
    capability = torch.backends.cpu.get_cpu_capability()
    first = 0 if capability.startswith("AVX512") else 1 if capability == "AVX2" else 2
    for name in _BUILDS[first:]:
        try:
            return import_module(f"{__package__}.{name}")
        except ImportError:
            continue
    return None


_native = _load()


def module_for(*tensors: Tensor | None) -> ModuleType | None:
    """The compiled module if it can take these tensors: plain, contiguous, on the CPU, float32 or int64, untraced."""
    if _native is None:
        return None
    for tensor in tensors:
        if tensor is not None and (
            type(tensor) not in (Tensor, torch.nn.Parameter)
            or not tensor.is_cpu
            or tensor.dtype not in (torch.float32, torch.int64)
            or not tensor.is_contiguous()
        ):
            return None
    return _native


def rows_of(matrix: Tensor) -> tuple[Tensor, int]:
    """What :func:`module_for` is to check of a matrix with contiguous rows, and the elements from one to the next."""
    if matrix.is_contiguous():
        return matrix, matrix.shape[-1]
    stride = matrix.stride(0) if matrix.dim() == 2 and matrix.shape[0] > 1 else matrix.shape[-1]
    contiguous = matrix.dim() == 2 and matrix.stride(1) == 1
    return (matrix[0] if contiguous and matrix.shape[0] else matrix), stride


@cache
def has_bfloat16() -> bool:
    """Whether the compiled module is there and the processor multiplies bfloat16 natively, which torch may use."""
    return _native is not None and bool(_native.has_bfloat16())
