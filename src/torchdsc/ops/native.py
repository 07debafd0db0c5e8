"""The optional compiled functions for a few tokens on a CPU: None where they were not built."""

from types import ModuleType

import torch
from torch import Tensor

__all__ = ["FEW_PAIRS", "module_for"]

# Selections up to which calls cost more than their work: decoding, not prefill.
FEW_PAIRS = 64

_native: ModuleType | None
try:
    from . import _native  # type: ignore[attr-defined, no-redef]
except ImportError:
    _native = None


def module_for(*tensors: Tensor) -> ModuleType | None:
    """The compiled module if it can take these tensors: plain, contiguous, on the CPU, float32 or int64, untraced."""
    if _native is None:
        return None
    for tensor in tensors:
        if (
            type(tensor) not in (Tensor, torch.nn.Parameter)
            or not tensor.is_cpu
            or tensor.dtype not in (torch.float32, torch.int64)
            or not tensor.is_contiguous()
        ):
            return None
    return _native
