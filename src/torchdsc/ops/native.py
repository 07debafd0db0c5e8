"""Access to the optional compiled functions for CPUs; without them, tensor operations do the same."""

from functools import cache
from importlib import import_module
from types import ModuleType

import torch
from torch import Tensor

__all__ = ["FEW_PAIRS", "MOST_SELECTED", "MOST_TAPS", "build_name", "has_bfloat16", "module_for", "rows_of"]

# Up to so many selections, as in decoding, the overhead of calls costs more than the work.
FEW_PAIRS = 64
# The largest top-k of the compiled functions; beyond it torch.topk is as fast.
MOST_SELECTED = 64
# The widest short convolution of the compiled functions.
MOST_TAPS = 16
# Builds of the module, from the most specific processors to any.
_BUILDS = ("_native_avx512", "_native_avx2", "_native")


def _load() -> ModuleType | None:
    """Import the build for the instruction set that torch uses (see ``ATEN_CPU_CAPABILITY``), or one for less."""
    capability = torch.backends.cpu.get_cpu_capability()
    first = 0 if capability.startswith("AVX512") else 1 if capability == "AVX2" else 2
    for name in _BUILDS[first:]:
        try:
            return import_module(f"{__package__}.{name}")
        except ImportError:
            continue
    return None


_native = _load()


def build_name() -> str | None:
    """Name of the compiled build in use, for the processor at hand; None where none was built or fits.

    ``_native_avx512``, ``_native_avx2`` or ``_native``. Last bits of results depend on it.
    """
    return None if _native is None else _native.__name__.rpartition(".")[2]


def module_for(*tensors: Tensor | None) -> ModuleType | None:
    """The compiled module if it can take these tensors, else None.

    It takes contiguous plain tensors on the CPU, of dtype float32 or int64.
    """
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
    """For a matrix with contiguous rows: a tensor for :func:`module_for` to check, and the stride between rows."""
    if matrix.is_contiguous():
        return matrix, matrix.shape[-1]
    stride = matrix.stride(0) if matrix.dim() == 2 and matrix.shape[0] > 1 else matrix.shape[-1]
    contiguous = matrix.dim() == 2 and matrix.stride(1) == 1
    return (matrix[0] if contiguous and matrix.shape[0] else matrix), stride


@cache
def has_bfloat16() -> bool:
    """Whether the compiled module exists and the processor multiplies bfloat16 natively."""
    return _native is not None and bool(_native.has_bfloat16())
