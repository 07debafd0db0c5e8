"""The optional compiled functions for a CPU; where they were not built, tensor operations stand in for them."""

from functools import cache
from types import ModuleType

import torch
from torch import Tensor

__all__ = ["FEW_PAIRS", "MOST_MIXED", "MOST_SELECTED", "address", "has_bfloat16", "module_for", "rows_of"]

# Selections up to which calls cost more than their work: decoding, not prefill.
FEW_PAIRS = 64
# The most atoms that the compiled functions select; a general top-k does more, and as quickly.
MOST_SELECTED = 64
# The most tokens that they mix into one.
MOST_MIXED = 16

_native: ModuleType | None
try:
    from . import _native  # type: ignore[attr-defined, no-redef]
except ImportError:
    _native = None


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


def address(tensor: Tensor | None) -> int:
    """Where the tensor's elements start, as the compiled functions take it; 0 for None."""
    return 0 if tensor is None else tensor.data_ptr()


@cache
def has_bfloat16() -> bool:
    """Whether the compiled module is there and the processor multiplies bfloat16 natively."""
    return _native is not None and bool(_native.has_bfloat16())
