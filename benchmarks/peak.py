"""The memory that a call takes beyond what was there before it.

On CUDA the allocator counts it exactly. On a CPU it is the resident high-water mark, set back in this process before
the call, after malloc has returned what it holds: timings and memory are then those of the same warm tensors, and cost
no new process for each of hundreds of calls. Pages that malloc could not return hide up to their size, and the kernel
counts in batches: below about a megabyte the figure says nothing. Where the mark cannot be set back there is no figure.
Steps of gigabytes, whose figure is quoted, run in a fresh process each (``suite/memory.py``).
"""

import functools
from collections.abc import Callable

import torch

from torchdsc.lab.training.environment import peak_memory_bytes, reset_peak_memory

_PROBE_BYTES = 1 << 26


def extra_bytes(call: Callable[[], object]) -> int | None:
    """Peak bytes during ``call`` over those before it; None where this system does not tell."""
    if not torch.cuda.is_available() and not _can_set_back():
        return None
    reset_peak_memory()
    before = torch.cuda.memory_allocated() if torch.cuda.is_available() else peak_memory_bytes()
    result = call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    peak = peak_memory_bytes()
    del result
    return max(0, peak - before)


@functools.cache
def _can_set_back() -> bool:
    reset_peak_memory()
    before = peak_memory_bytes()
    torch.ones(_PROBE_BYTES // 4)
    high = peak_memory_bytes()
    reset_peak_memory()
    return high - before > _PROBE_BYTES // 2 and peak_memory_bytes() - before < _PROBE_BYTES // 2
