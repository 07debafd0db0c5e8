"""A solver for each form of a method; each takes targets and returns the plan."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from math import ceil, isqrt, sqrt

from torchdsc.baselines.methods import METHODS, Form

from .plan import Plan, feed_forward_parameters
from .targets import Targets

# The share of its feed-forward budget that a plan of free widths may miss before better widths are looked for.
TOLERANCE = 1e-3


def solve_dense(targets: Targets) -> Plan:
    """Stored 2 D H, or 3 D H with a gate: the largest width H that the total holds."""
    each, _ = feed_forward_parameters(
        targets.method, targets.budget.d_model, 1, targets.options, targets.budget.n_layer
    )
    width = targets.stored // each
    if width < 1:
        least = targets.fixed + each
        raise ValueError(f"total must be at least {least:,} for width 1, got {targets.total:,}{targets.source}")
    return targets.plan(width)


def solve_experts(targets: Targets) -> Plan:
    """Stored D N (2 H + 1), active 2 K D H + D N: N whose H, by the active target, meets the total best.

    S shared experts are 2 S D H more of both. Gated experts have three matrices instead of two.
    """
    unit, fewest = targets.unit, max(3, targets.top_k + 1)
    each = 3 if targets.options.get("gated") else 2
    shared: int = targets.options.get("shared_experts", 0)
    taken = targets.top_k + shared
    least, why = each * taken + fewest, f"{fewest} experts of width 1"
    targets.check_total(least, why)
    targets.check_active(least * unit, why)

    def width(experts: int) -> int:
        return (targets.used - unit * experts) // (each * unit * taken)

    def distance(experts: int) -> int:
        return abs((each * (experts + shared) * width(experts) + experts) * unit - targets.stored)

    # More experts than this leave no width, or so little that more store less: fewer, wider ones do too.
    room = targets.used // unit
    most = max(fewest, min(room - each * taken, (room + targets.top_k) // 2))
    best = min(range(fewest, most + 1), key=distance)
    return targets.plan(width(best), best)


def solve_update(targets: Targets) -> Plan:
    """An update beside a static layer: in closed form with a linear router, where no others use its atoms."""
    router = targets.options.get("router", METHODS[targets.method].router)
    own_router = router != "linear" or targets.options.get("atom_features") or targets.options.get("offset")
    if own_router or targets.model.share_bank or targets.model.attention_rank:
        return _solve_router(targets, router)
    return _solve_atoms(targets)


def _solve_atoms(targets: Targets) -> Plan:
    """Stored 2 D H + (2 r + 1) D N, active 2 D H + D N + 2 r D K: two equations for N atoms or experts and width H."""
    unit, top_k, rank, name = targets.unit, targets.top_k, targets.rank, targets.count_name
    each = 2 * rank + 1
    targets.check_total(each * top_k, f"{name} = top_k = {top_k}")
    count = (targets.stored - targets.used + 2 * rank * top_k * unit) // (2 * rank * unit)
    # Active parameters at width 0, with the count that the total then asks for.
    least = -(-targets.stored // each) + 2 * rank * top_k * unit
    targets.check_active(least, f"a static layer beside {name} = {count:,} with top_k = {top_k}")

    # The paper rounds both down. If that misses by more than the tolerance, search the widths around.
    floored = targets.plan(max(0, (targets.stored - each * count * unit) // targets.each_width), count)
    if _miss(floored) <= TOLERANCE:
        return floored
    return min((targets.plan(*pair) for pair in _around(targets, count)), key=_miss)


def _solve_router(targets: Targets, router: str) -> Plan:
    """Solve PEER, or DSC with a non-linear router or a shared bank.

    All of a router is active, so stored minus active parameters are 2 D (M - K) for each layer, or 2 D (M - L K) for
    one bank in L layers, which gives M. If attention uses the bank too, K is replaced by 2 K, and D by the features of
    thin atoms. Parameters of routers are counted on the built layer.
    """
    top_k, name = targets.top_k, targets.count_name
    features = targets.options.get("atom_features") or targets.budget.d_model
    layers = targets.budget.n_layer
    # An atom's parameters.
    atom = 2 * features + bool(targets.options.get("offset"))
    stored_atom = atom * (1 if targets.model.share_bank else layers)
    composed = 2 * top_k if targets.model.attention_rank else top_k
    count = (targets.stored - targets.used + composed * atom * layers) // stored_atom
    counts = [count]
    if router == "product_key":
        counts = [side * side for side in (isqrt(max(0, count)), isqrt(max(0, count)) + 1)]
    counts = [count for count in counts if count >= top_k]
    if not counts:
        least_count = ceil(sqrt(top_k)) ** 2 if router == "product_key" else top_k
        nearest = targets.active + stored_atom * least_count - composed * atom * layers
        raise ValueError(f"total must be at least {nearest:,} for {name} = top_k, got {targets.total:,}")

    found, missing = [], []
    for count in counts:
        empty = targets.plan(0, count)
        room = min(targets.total - empty.params_total, targets.active - empty.params_active)
        if room >= 0:
            found.append(targets.plan(max(0, room - targets.gate_context) // targets.each_width, count))
        missing.append(empty)
    if not found:
        least = missing[0]
        raise ValueError(
            f"total and active must be at least {least.params_total:,} and {least.params_active:,} for a "
            f"router = {router!r} beside {name} = {least.options[name]:,}, "
            f"got {targets.total:,} and {targets.active:,}{targets.source}"
        )
    return min(found, key=_miss)


def _around(targets: Targets, count: int) -> Iterator[tuple[int, int]]:
    """Candidates of width and count: for counts nearby, the widths between those that meet either target."""
    for nearby in range(max(targets.top_k, count - 2), count + 3):
        empty = targets.plan(0, nearby)
        missing = sorted((targets.total - empty.params_total, targets.active - empty.params_active))
        fewest, most = missing[0] // targets.each_width, missing[1] // targets.each_width + 1
        for width in range(max(0, fewest), max(0, most) + 1):
            yield width, nearby


def _miss(plan: Plan) -> float:
    return max(abs(plan.miss_total), abs(plan.miss_active or 0.0))


SOLVERS: dict[Form, Callable[[Targets], Plan]] = {
    "dense": solve_dense,
    "experts": solve_experts,
    "update": solve_update,
}
