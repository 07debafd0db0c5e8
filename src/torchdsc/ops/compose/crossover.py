"""The choice of ``impl="auto"``, from crossovers.json, which ``python -m benchmarks crossover`` measures."""

import functools
import json
import math
from importlib import resources
from typing import Any

import torch

from torchdsc.ops.native import FEW_PAIRS

# Below this share of selected atoms, the masked product was never faster.
_LEAST_RATIO = 0.02
IMPLEMENTATIONS = ("reference", "gather", "dense", "triton")


def choose_implementation(num_tokens: int, num_atoms: int, top_k: int, width: int, device: torch.device | str) -> str:
    """Name the implementation that ``impl="auto"`` uses.

    The cost of "dense" grows with ``num_tokens x num_atoms``, that of "gather" with ``num_tokens x top_k``. The ratio
    K / M from which "dense" is faster was measured for several numbers of tokens, atoms and features; the nearest
    measurement decides.

    Args:
        num_tokens: Tokens in the call.
        num_atoms: M, atoms in the bank.
        top_k: K, atoms composed per token.
        width: d_in, features of the input.
        device: Device of the call, or its type. Devices without a measurement use "gather".

    Returns:
        "gather" or "dense".
    """
    # Most calls are decided here.
    if num_tokens * top_k <= FEW_PAIRS or top_k < _LEAST_RATIO * num_atoms:
        return "gather"
    points = _crossovers().get(device if isinstance(device, str) else device.type, [])
    if not points:
        return "gather"

    def distance(point: dict[str, Any]) -> float:
        factors = num_tokens / point["tokens"], num_atoms / point["atoms"], width / point["width"]
        return sum(abs(math.log(factor)) for factor in factors)

    nearest = min(points, key=distance)
    return "dense" if top_k / num_atoms >= nearest["ratio"] else "gather"


@functools.cache
def _crossovers() -> dict[str, list[dict[str, Any]]]:
    text = resources.files(__package__).joinpath("crossovers.json").read_text(encoding="utf-8")
    measured: dict[str, list[dict[str, Any]]] = json.loads(text)["crossovers"]
    return measured
