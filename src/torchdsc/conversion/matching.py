"""Sizes of a layer that stores no more than the module it replaces."""

from collections.abc import Callable
from math import isqrt
from typing import Any

import torch

from torchdsc.nn import DSC, ContextOptions

# The static layer's default share of a parameter budget, about what it has in this project's studies.
_STATIC_SHARE = 0.1


def match_parameters(
    budget: int,
    in_features: int,
    out_features: int,
    context: ContextOptions,
    options: dict[str, Any],
    hidden_features: int | None,
) -> tuple[int, int]:
    """Find M and the width of the static layer for at most ``budget`` parameters, short convolutions included.

    Args:
        budget: Number of parameters of the module that is replaced.
        in_features: d_in.
        out_features: d_out.
        context: The short convolutions.
        options: Of DSC; "num_atoms" is chosen here unless given.
        hidden_features: Width of the static layer; chosen here by default, as 0 if d_in is not d_out.

    Returns:
        M and the width, as large as the budget allows.

    Raises:
        ValueError: If K atoms, or the sizes that are given, do not fit in the budget.
    """
    is_gated = context.static == "gated" and hidden_features != 0 and in_features == out_features
    room = budget - context.beside(gate=is_gated).context_rows * in_features
    # Of a unit of width of the static layer.
    each = 3 * in_features if is_gated else in_features + out_features

    def stored(num_atoms: int) -> int:
        with torch.device("meta"):
            layer = DSC(in_features, out_features, **{**options, "num_atoms": num_atoms})
        return sum(parameter.numel() for parameter in layer.parameters())

    given: int | None = options.get("num_atoms")
    fewest = options["top_k"] if given is None else given
    if options.get("router") == "product_key":
        # M is a square.
        fewest = (isqrt(fewest - 1) + 1) ** 2 if given is None else given
    if hidden_features is not None:
        width = hidden_features
    elif in_features != out_features:
        width = 0
    elif given is not None:
        width = max(0, (room - stored(given)) // each)
    else:
        width = max(0, min(round(_STATIC_SHARE * budget), room - stored(fewest)) // each)
    room -= width * each
    if stored(fewest) > room:
        raise ValueError(
            f"match must be None, or the module larger: its {budget:,} parameters hold no layer of num_atoms = "
            f"{fewest} and hidden_features = {width}, which stores {budget - room + stored(fewest):,} with its contexts"
        )
    if given is not None:
        return given, width
    if options.get("router") == "product_key":
        return _largest(isqrt(fewest), lambda side: stored(side * side) <= room) ** 2, width
    return _largest(fewest, lambda count: stored(count) <= room), width


def _largest(start: int, fits: Callable[[int], bool]) -> int:
    """The largest number that fits, by bisection from ``start``, which fits."""
    least, most = start, 2 * start
    while fits(most):
        least, most = most, 2 * most
    while most - least > 1:
        middle = (least + most) // 2
        least, most = (middle, most) if fits(middle) else (least, middle)
    return least
