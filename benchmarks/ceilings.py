"""What this machine can do at most, measured in the process that is about to be compared with it."""

from dataclasses import asdict, dataclass
from typing import Any

import torch

from torchdsc.lab.training.latency import measure_in_turn

from .case import Floor

_COPY_BYTES = 1 << 28
_PRODUCT_SIZE = {"cpu": 2048, "cuda": 8192}


@dataclass(frozen=True)
class Ceilings:
    """Rates in float32, with the threads that the benchmarks use; the fastest of the rounds.

    Attributes:
        copy_bytes_per_second: Of a copy too large for any cache, bytes read and written added up.
        product_operations_per_second: Of a square matrix product, two operations a multiply-add.
    """

    copy_bytes_per_second: float
    product_operations_per_second: float

    def as_dict(self) -> dict[str, float]:
        return asdict(self)

    def floor(self, floor: Floor, median_ms: float) -> dict[str, Any]:
        """A floor in milliseconds, and which part of ``median_ms`` it is.

        Both rates cannot be beaten at once, so that the larger of the two times counts. Data that stay in a cache
        between calls move faster than the copy: a small call may take less than its floor.
        """
        copy_ms = floor.bytes / self.copy_bytes_per_second * 1e3
        product_ms = floor.operations / self.product_operations_per_second * 1e3
        return {
            "bytes": floor.bytes,
            "operations": floor.operations,
            "copy_ms": copy_ms,
            "product_ms": product_ms,
            "ms": max(copy_ms, product_ms),
            "achieved": max(copy_ms, product_ms) / median_ms,
        }


def measure_ceilings(
    device: str, *, copy_bytes: int = _COPY_BYTES, product_size: int | None = None, rounds: int = 7
) -> Ceilings:
    """Measure both rates.

    Args:
        device: "cpu" or "cuda".
        copy_bytes: Size of what is copied, in bytes; far beyond the last cache.
        product_size: Rows and columns of the factors.
        rounds: Counted rounds, >= 2.
    """
    size = _PRODUCT_SIZE[device] if product_size is None else product_size
    source = torch.ones(copy_bytes // 4, device=device)
    target = torch.empty_like(source)
    left, right = torch.randn(size, size, device=device), torch.randn(size, size, device=device)
    product = torch.empty_like(left)
    timings = measure_in_turn(
        {"copy": lambda: target.copy_(source), "product": lambda: torch.mm(left, right, out=product)},
        rounds=rounds,
        warmup=2,
    )
    return Ceilings(
        copy_bytes_per_second=2 * copy_bytes / min(timings["copy"].samples) * 1e3,
        product_operations_per_second=2 * size**3 / min(timings["product"].samples) * 1e3,
    )
