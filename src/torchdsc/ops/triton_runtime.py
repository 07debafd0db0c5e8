"""Checks whether Triton kernels can run. Made when a kernel is asked for, so that nothing else needs triton."""

import functools
from contextlib import AbstractContextManager

import torch
from torch import Tensor


def require_triton(device: torch.device) -> None:
    """Raise an error, which says what to do, if Triton kernels cannot run.

    Args:
        device: Device of the kernel's tensors.

    Raises:
        ImportError: If triton is not installed, or does not import.
        RuntimeError: If ``device`` is the CPU and triton does not interpret its kernels.
    """
    if not interprets() and device.type == "cpu":
        raise RuntimeError(
            "impl='triton' runs on a GPU, got tensors on the CPU; use 'auto', 'gather' or 'dense', or set "
            "TRITON_INTERPRET=1 before the first import of triton to have its kernels interpreted, slowly"
        )


@functools.cache
def interprets() -> bool:
    """Whether kernels are interpreted on the CPU rather than compiled.

    Raises:
        ImportError: If triton is not installed, or does not import.
    """
    try:
        import triton
        import triton.language
    except Exception as error:  # A broken installation fails in ways of its own.
        raise ImportError(f"impl='triton' needs triton: pip install 'torchdsc[triton]' ({error})") from error
    # Whether triton's own functions are interpreted was settled at its import, and ours must match them.
    return not isinstance(triton.language.sum, triton.JITFunction)


@functools.cache
def has_triton() -> bool:
    """Whether triton is installed and imports."""
    try:
        interprets()
    except ImportError:
        return False
    return True


def device_of(tensor: Tensor) -> AbstractContextManager[None]:
    """Context that makes the tensor's GPU the current one, for launching kernels."""
    context: AbstractContextManager[None] = torch.cuda.device_of(tensor)  # type: ignore[no-untyped-call]
    return context


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least ``n`` and 1; sides of a kernel's blocks must be powers of two."""
    return 1 << max(0, n - 1).bit_length()
