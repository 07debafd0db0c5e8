"""One solver a method; each takes targets and returns the plan."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from math import ceil, isqrt, sqrt
from typing import TYPE_CHECKING

from .plan import Plan
from .targets import Targets

if TYPE_CHECKING:
    from torchdsc.models.options import FeedForwardKind

# The share of its feed-forward budget that a plan of free widths may miss before better widths are looked for.
TOLERANCE = 1e-3


def solve_dense(targets: Targets) -> Plan:
    """Stored 2 D H: the largest width H that the total holds."""
    width = targets.stored // (2 * targets.unit)
    if width < 1:
        least = targets.fixed + 2 * targets.unit
        raise ValueError(f"total must be at least {least:,} for width 1, got {targets.total:,}{targets.source}")
    return targets.plan("dense", width, {})


def solve_moe(targets: Targets, top_k: int) -> Plan:
    """Stored D N (2 H + 1), active 2 K D H + D N: N whose H, by the active target, meets the total best.

    S shared experts are 2 S D H more of both.
    """
    unit, fewest = targets.unit, max(3, top_k + 1)
    shared: int = targets.options.get("shared_experts", 0)
    taken = top_k + shared
    least, why = 2 * taken + fewest, f"{fewest} experts of width 1"
    targets.check_total(least, why)
    targets.check_active(least * unit, why)

    def width(experts: int) -> int:
        return (targets.used - unit * experts) // (2 * unit * taken)

    def distance(experts: int) -> int:
        return abs((2 * (experts + shared) * width(experts) + experts) * unit - targets.stored)

    # More experts than this leave no width.
    most = targets.used // unit - 2 * taken
    best = min(range(fewest, most + 1), key=distance)
    return targets.plan("moe", width(best), {"num_experts": best, "top_k": top_k})


def solve_atoms(targets: Targets, method: FeedForwardKind, top_k: int, rank: int) -> Plan:
    """Stored 2 D H + (2 r + 1) D N, active 2 D H + D N + 2 r D K: two equations for N atoms or experts and width H."""
    unit, each = targets.unit, 2 * rank + 1
    name = "num_atoms" if method == "dsc" else "num_experts"
    targets.check_total(each * top_k, f"{name} = top_k = {top_k}")
    count = (targets.stored - targets.used + 2 * rank * top_k * unit) // (2 * rank * unit)
    # Active parameters at width 0, with the count that the total then asks for.
    least = -(-targets.stored // each) + 2 * rank * top_k * unit
    targets.check_active(least, f"a static layer beside {name} = {count:,} with top_k = {top_k}")

    def plan(count: int, width: int) -> Plan:
        widths = {name: count, "top_k": top_k} | ({} if method == "dsc" else {"rank": rank})
        return targets.plan(method, width, widths)

    # The paper floors both. Where that misses by more than the tolerance, look for the best widths around.
    floored = plan(count, max(0, (targets.stored - each * count * unit) // (2 * unit)))
    if _miss(floored) <= TOLERANCE:
        return floored
    return min((plan(*pair) for pair in _around(targets, plan, count, top_k)), key=_miss)


def solve_router(targets: Targets, method: FeedForwardKind, top_k: int) -> Plan:
    """PEER, or DSC with another router than the linear one or a shared bank: a router is active as a whole.

    So stored less active is 2 D (M - K) a layer whatever the router, 2 D (M - L K) for one bank in L layers, which
    gives M. Where attention composes from the bank too it is 2 K. Routers' parameters are counted on the built layer.
    """
    unit, options, is_peer = targets.unit, targets.options, method == "peer"
    name = "num_experts" if is_peer else "num_atoms"
    router = "product_key" if is_peer else options.get("router", "linear")
    stored_atom = 2 * (targets.budget.d_model if options.get("share_bank") else unit)
    composed = 2 * top_k if options.get("attention_rank") else top_k
    count = (targets.stored - targets.used + 2 * composed * unit) // stored_atom
    counts = [count]
    if router == "product_key":
        counts = [side * side for side in (isqrt(max(0, count)), isqrt(max(0, count)) + 1)]
    counts = [count for count in counts if count >= top_k]
    if not counts:
        least_count = ceil(sqrt(top_k)) ** 2 if router == "product_key" else top_k
        nearest = targets.active + stored_atom * least_count - 2 * unit * composed
        raise ValueError(f"total must be at least {nearest:,} for {name} = top_k, got {targets.total:,}")

    def plan(count: int, width: int) -> Plan:
        return targets.plan(method, width, {name: count, "top_k": top_k})

    found, missing = [], []
    for count in counts:
        empty = plan(count, 0)
        room = min(targets.total - empty.params_total, targets.active - empty.params_active)
        if room >= 0:
            found.append(plan(count, room // (2 * unit)))
        missing.append(empty)
    if not found:
        least = missing[0]
        raise ValueError(
            f"total and active must be at least {least.params_total:,} and {least.params_active:,} for a "
            f"router = {router!r} beside {name} = {least.options[name]:,}, "
            f"got {targets.total:,} and {targets.active:,}{targets.source}"
        )
    return min(found, key=_miss)


def _around(targets: Targets, plan: Callable[[int, int], Plan], count: int, top_k: int) -> Iterator[tuple[int, int]]:
    """Counts nearby, each with the widths between those that meet the one target and the other."""
    for nearby in range(max(top_k, count - 2), count + 3):
        empty = plan(nearby, 0)
        missing = sorted((targets.total - empty.params_total, targets.active - empty.params_active))
        fewest, most = missing[0] // (2 * targets.unit), missing[1] // (2 * targets.unit) + 1
        for width in range(max(0, fewest), max(0, most) + 1):
            yield nearby, width


def _miss(plan: Plan) -> float:
    return max(abs(plan.miss_total), abs(plan.miss_active or 0.0))
