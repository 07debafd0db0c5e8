"""Banks that stay in the file they were loaded from: rows are read as they are used, and asked for before that."""

import ctypes
import functools
import mmap
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from torchdsc.arguments import check_types

if TYPE_CHECKING:
    from .bank import BasisBank

# Of Linux's madvise.
_RANDOM, _WILL_NEED = 1, 3


def leave_on_disk(model: nn.Module, *, ahead: bool = True) -> int:
    """Read the atoms of a model's banks from its file as they are used, for a bank that is larger than the memory.

    ``from_pretrained`` maps a file of safetensors into memory instead of reading it, on a CPU and in the file's dtype.
    By itself the system then reads 128 KB around each row, most of them in vain. After this call it reads the pages of
    the selected rows alone, and asks for them as soon as a layer has routed. Where routing depends on tokens alone, as
    with ``router="ngram"``, DSCGPT routes all its layers before the first one runs, so that rows arrive while layers
    compute. Outputs stay bit for bit the same. It is for inference: training would change rows in memory alone.

    Where memory suffices, leave it out: the system soon has the whole bank there. A call with so many tokens that they
    select more atoms than there are, repeats counted, reads the whole bank.

    Args:
        model: With DSC layers, loaded by ``from_pretrained``.
        ahead: Ask for rows as soon as a layer has routed, instead of reading each when its turn comes.

    Returns:
        Bytes of the banks that stay on disk.

    Raises:
        TypeError: If an argument has another type.
        OSError: On another system than Linux.
        ValueError: If the model has no bank, or one that is not mapped from a file or has kept atoms.
    """
    from .bank import BasisBank

    check_types(leave_on_disk, locals())
    if sys.platform != "linux":
        raise OSError(f"leave_on_disk needs Linux, got {sys.platform}")
    banks = {name: module for name, module in model.named_modules() if isinstance(module, BasisBank)}
    if not banks:
        raise ValueError(f"model must have a bank of atoms, got {type(model).__name__} without one")
    mapped = _mapped_ranges()
    for name, bank in banks.items():
        if bank.kept_atoms:
            raise ValueError(f"{name} must have no kept atoms to stay on disk, got {bank.kept_atoms}")
        for key in ("u", "v"):
            atoms = getattr(bank, key)
            start = atoms.data_ptr() if atoms.device.type == "cpu" and type(atoms) is nn.Parameter else 0
            if not any(low <= start < high for low, high in mapped) or not atoms.is_contiguous():
                raise ValueError(
                    f"{name}.{key} must be mapped from a file, as from_pretrained leaves it on a CPU in the file's "
                    f"dtype, got one of {atoms.dtype} on {atoms.device} in memory"
                )
    for bank in banks.values():
        for atoms in (bank.u, bank.v):
            if _advise(atoms.data_ptr(), atoms.data_ptr() + atoms.nbytes, _RANDOM):
                raise OSError(ctypes.get_errno(), "the system takes no advice on mapped memory (madvise)")
        bank.asks_ahead = ahead
    return sum(bank.u.nbytes + bank.v.nbytes for bank in banks.values())


def ask_for_rows(bank: "BasisBank", indices: Tensor) -> None:
    """Ask the system for the atoms at ``indices`` (int64, any shape), without waiting for them."""
    if type(indices) is not Tensor or indices.device.type != "cpu" or not len(indices):
        return
    used = torch.unique(indices)
    for atoms in (bank.u, bank.v):
        size = atoms.shape[1] * atoms.element_size()
        first = (atoms.data_ptr() + used * size) // mmap.PAGESIZE
        last = (atoms.data_ptr() + (used + 1) * size - 1) // mmap.PAGESIZE
        # Pages that follow one another are asked for together.
        apart = first[1:] > last[:-1] + 1
        starts = first[:1].tolist() + first[1:][apart].tolist()
        ends = last[:-1][apart].tolist() + last[-1:].tolist()
        for start, end in zip(starts, ends, strict=True):
            # A hint that the system does not take costs time alone.
            _advise(start * mmap.PAGESIZE, (end + 1) * mmap.PAGESIZE, _WILL_NEED)


def _advise(start: int, end: int, advice: int) -> int:
    """Tell the system how the memory from ``start`` to ``end`` will be used; not zero if it does not listen."""
    start -= start % mmap.PAGESIZE
    result: int = _madvise()(start, end - start, advice)
    return result


@functools.cache
def _madvise() -> Any:
    function = ctypes.CDLL(None, use_errno=True).madvise
    function.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return function


def _mapped_ranges() -> list[tuple[int, int]]:
    """Addresses of this process that are mapped from files."""
    ranges = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        fields = line.split(maxsplit=5)
        # Shared memory has names too.
        if len(fields) == 6 and fields[5].startswith("/") and not fields[5].startswith(("/dev/", "/memfd:")):
            low, high = fields[0].split("-")
            ranges.append((int(low, 16), int(high, 16)))
    return ranges
