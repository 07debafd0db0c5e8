"""The budget solver: widths of each method for a target of total and active parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from math import ceil, floor, isfinite, isqrt, sqrt
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torchdsc.models.feed_forward import FeedForwardKind

__all__ = ["METHODS", "Budget", "Plan", "feed_forward_parameters", "solve", "solve_all"]

METHODS: tuple[FeedForwardKind, ...] = ("dense", "moe", "mixture_of_loras", "dsc")

# The share of its feed-forward budget that a plan of free widths may miss before better widths are looked for.
TOLERANCE = 1e-3


@dataclass(frozen=True)
class Budget:
    """Target parameters of a whole DSCGPT, and the sizes that all methods share.

    Attributes:
        total: Stored parameters.
        active: Parameters that one token uses.
        d_model: Hidden size D.
        n_layer: Layers.
        vocab_size: Tokens of the tied embedding.
        n_positions: Learned positions.
    """

    total: float
    active: float
    d_model: int
    n_layer: int
    vocab_size: int = 50304
    n_positions: int = 256

    def __post_init__(self) -> None:
        for name in ("total", "active", "d_model", "n_layer", "vocab_size", "n_positions"):
            value = getattr(self, name)
            if not (value > 0 and isfinite(value)):
                raise ValueError(f"{name} must be a finite number > 0, got {value}")

    @property
    def fixed(self) -> int:
        """Parameters outside the feed-forward layers: embeddings, attention 4 D^2 and norms 4 D a layer, final norm."""
        d = self.d_model
        return (self.vocab_size + self.n_positions) * d + self.n_layer * (4 * d * d + 4 * d) + 2 * d


@dataclass(frozen=True)
class Plan:
    """A method's widths and what they come to.

    Attributes:
        method: Which.
        intermediate_size: Width of the dense or static layer, or of one expert.
        options: Feed-forward options of :class:`torchdsc.models.DSCGPTConfig`.
        params_total: Stored parameters of the whole model, as built.
        params_active: Active ones.
        miss_total: Difference of the stored feed-forward parameters to the target, as a share of it.
        miss_active: Likewise for active ones; None for dense, which has no target of its own.
        description: The widths in words.
    """

    method: FeedForwardKind
    intermediate_size: int
    options: dict[str, Any]
    params_total: int
    params_active: int
    miss_total: float
    miss_active: float | None
    description: str = field(default="")


def feed_forward_parameters(
    method: FeedForwardKind, d_model: int, intermediate_size: int, options: dict[str, Any]
) -> tuple[int, int]:
    """Stored and active parameters of one feed-forward layer, counted on the built module.

    Args:
        method: Which.
        d_model: D.
        intermediate_size: Width.
        options: Feed-forward options.

    Returns:
        The two counts.
    """
    # Imported late: the command line shows its help before these load.
    import torch

    from torchdsc.models.feed_forward import build_feed_forward

    with torch.device("meta"):
        module = build_feed_forward(method, d_model, intermediate_size, options)
    total = sum(parameter.numel() for parameter in module.parameters())
    idle = 0
    if method == "dsc":
        idle = 2 * d_model * (options["num_atoms"] - options["top_k"])
    elif method == "mixture_of_loras":
        idle = 2 * d_model * options["rank"] * (options["num_experts"] - options.get("top_k", 2))
    elif method == "moe":
        idle = 2 * d_model * intermediate_size * (options["num_experts"] - options.get("top_k", 2))
    return total, total - idle


def solve(
    method: FeedForwardKind,
    budget: Budget,
    *,
    top_k: int | None = None,
    rank: int = 1,
    match: Plan | None = None,
    options: dict[str, Any] | None = None,
) -> Plan:
    """Find a method's widths.

    Dense has one width and meets the total; MoE goes in steps of an expert and takes the nearest; DSC and
    Mixture-of-LoRAs meet both within 0.1 % of the feed-forward budget, where that is more than a step of their widths
    (2 D parameters, 2 r D for experts of rank r); the plan says by how much it misses. With product keys M is a square,
    and DSC stays below both targets or next to them.

    Args:
        method: "dense", "moe", "mixture_of_loras" or "dsc".
        budget: Targets and sizes.
        top_k: Atoms or experts per token; 4 for DSC and Mixture-of-LoRAs, 2 for MoE by default.
        rank: Of Mixture-of-LoRAs.
        match: Another method's plan whose realised numbers replace the targets.
        options: Further feed-forward options, counted with the rest where they have parameters.

    Returns:
        The plan.

    Raises:
        ValueError: If the method is unknown, an option is the solver's to choose, or a target infeasible: it says
            which, and the nearest feasible one.
    """
    if method not in METHODS:
        raise ValueError(f"method must be one of {METHODS}, got {method!r}")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k must be >= 1, got {top_k}")
    if rank < 1:
        raise ValueError(f"rank must be >= 1, got {rank}")
    chosen = sorted(_WIDTHS[method] & set(options or {}))
    if chosen:
        raise ValueError(
            f"options of {method} must leave {', '.join(sorted(_WIDTHS[method]))} to the solver, got {chosen}"
        )
    total = floor(budget.total) if match is None else match.params_total
    active = floor(budget.active) if match is None else match.params_active
    source = "" if match is None else f" (realised by {match.method})"
    targets = _Targets(budget, total, active, source, dict(options or {}))
    if method == "dense":
        return _solve_dense(targets)
    if method == "moe":
        return _solve_moe(targets, top_k or 2)
    if targets.options.get("router", "linear") != "linear":
        return _solve_router(targets, top_k or 4)
    return _solve_atoms(targets, method, top_k or 4, 1 if method == "dsc" else rank)


def solve_all(
    budget: Budget,
    *,
    top_k: int = 4,
    rank: int = 1,
    experts_per_token: int = 2,
    dsc_options: dict[str, Any] | None = None,
) -> list[Plan]:
    """Plans of all four methods; see :func:`solve`. ``dsc_options`` are further options of DSC, its router say."""
    return [
        solve("dense", budget),
        solve("moe", budget, top_k=experts_per_token),
        solve("mixture_of_loras", budget, top_k=top_k, rank=rank),
        solve("dsc", budget, top_k=top_k, options=dsc_options),
    ]


# What the solver sets itself, so that no option of the same name is dropped in silence.
_WIDTHS: dict[str, set[str]] = {
    "dense": set(),
    "moe": {"num_experts", "top_k"},
    "mixture_of_loras": {"num_experts", "rank", "top_k"},
    "dsc": {"num_atoms", "top_k"},
}


@dataclass(frozen=True)
class _Targets:
    """Targets of the whole model in whole parameters: the arithmetic below is exact."""

    budget: Budget
    total: int
    active: int
    source: str
    options: dict[str, Any]

    @property
    def stored(self) -> int:
        """Parameters that the total leaves to all feed-forward layers together."""
        return self.total - self.budget.fixed

    @property
    def used(self) -> int:
        """Parameters that the active target leaves to them."""
        return self.active - self.budget.fixed

    @property
    def unit(self) -> int:
        """D parameters in every layer: what widths and counts come in."""
        return self.budget.d_model * self.budget.n_layer

    def plan(self, method: FeedForwardKind, width: int, widths: dict[str, Any]) -> Plan:
        options = {**self.options, **widths}
        stored, used = feed_forward_parameters(method, self.budget.d_model, width, options)
        layers, fixed = self.budget.n_layer, self.budget.fixed
        return Plan(
            method=method,
            intermediate_size=width,
            options=options,
            params_total=fixed + layers * stored,
            params_active=fixed + layers * used,
            miss_total=layers * stored / self.stored - 1,
            miss_active=None if method == "dense" else layers * used / self.used - 1,
            description=_describe(method, width, options),
        )

    def check_total(self, least: int, why: str) -> None:
        """Raise unless the total is at least ``least`` units, what a method's smallest layer takes, and the active."""
        nearest = self.budget.fixed + least * self.unit
        if self.total < nearest:
            names, nearest = ("total and active", nearest) if self.active < nearest else ("total", self.active)
            raise ValueError(
                f"{names} must be at least {nearest:,} for {why}, "
                f"got total = {self.total:,} and active = {self.active:,}{self.source}"
            )
        if self.active > self.total:
            raise ValueError(f"active must be at most total = {self.total:,}, got {self.active:,}{self.source}")

    def check_active(self, least: int, why: str) -> None:
        """Raise unless the active target leaves ``least`` parameters to the feed-forward layers."""
        if self.used < least:
            nearest = self.budget.fixed + least
            raise ValueError(f"active must be at least {nearest:,} for {why}, got {self.active:,}{self.source}")


def _solve_dense(targets: _Targets) -> Plan:
    width = targets.stored // (2 * targets.unit)
    if width < 1:
        least = targets.budget.fixed + 2 * targets.unit
        raise ValueError(f"total must be at least {least:,} for width 1, got {targets.total:,}{targets.source}")
    return targets.plan("dense", width, {})


def _solve_moe(targets: _Targets, top_k: int) -> Plan:
    unit, fewest = targets.unit, max(3, top_k + 1)
    least, why = 2 * top_k + fewest, f"{fewest} experts of width 1"
    targets.check_total(least, why)
    targets.check_active(least * unit, why)

    def width(experts: int) -> int:
        return (targets.used - unit * experts) // (2 * unit * top_k)

    def distance(experts: int) -> int:
        return abs(experts * (2 * width(experts) + 1) * unit - targets.stored)

    # More experts than this leave no width.
    most = targets.used // unit - 2 * top_k
    best = min(range(fewest, most + 1), key=distance)
    return targets.plan("moe", width(best), {"num_experts": best, "top_k": top_k})


def _solve_atoms(targets: _Targets, method: FeedForwardKind, top_k: int, rank: int) -> Plan:
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


def _solve_router(targets: _Targets, top_k: int) -> Plan:
    """DSC with another router than the linear one: M follows as with it, for the router is active as a whole.

    Stored less active is 2 D (M - K) whatever the router. Its own parameters are counted on the built layer.
    """
    unit, router = targets.unit, targets.options["router"]
    count = (targets.stored - targets.used + 2 * top_k * unit) // (2 * unit)
    counts = [count]
    if router == "product_key":
        counts = [side * side for side in (isqrt(max(0, count)), isqrt(max(0, count)) + 1)]
    counts = [count for count in counts if count >= top_k]
    if not counts:
        nearest = targets.active + 2 * unit * (ceil(sqrt(top_k)) ** 2 - top_k if router == "product_key" else 0)
        raise ValueError(f"total must be at least {nearest:,} for num_atoms = top_k, got {targets.total:,}")

    def plan(count: int, width: int) -> Plan:
        return targets.plan("dsc", width, {"num_atoms": count, "top_k": top_k})

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
            f"router = {router!r} beside num_atoms = {least.options['num_atoms']:,}, "
            f"got {targets.total:,} and {targets.active:,}{targets.source}"
        )
    return min(found, key=_miss)


def _around(targets: _Targets, plan: Callable[[int, int], Plan], count: int, top_k: int) -> Iterator[tuple[int, int]]:
    """Counts nearby, each with the widths between those that meet the one target and the other."""
    for nearby in range(max(top_k, count - 2), count + 3):
        empty = plan(nearby, 0)
        missing = sorted((targets.total - empty.params_total, targets.active - empty.params_active))
        fewest, most = missing[0] // (2 * targets.unit), missing[1] // (2 * targets.unit) + 1
        for width in range(max(0, fewest), max(0, most) + 1):
            yield nearby, width


def _miss(plan: Plan) -> float:
    return max(abs(plan.miss_total), abs(plan.miss_active or 0.0))


def _describe(method: FeedForwardKind, width: int, widths: dict[str, Any]) -> str:
    router = widths.get("router", "linear")
    describe: dict[str, Callable[[], str]] = {
        "dense": lambda: f"width {width}",
        "moe": lambda: f"{widths['num_experts']} experts of {width}, top-{widths['top_k']}",
        "mixture_of_loras": lambda: (
            f"{widths['num_experts']} experts of rank {widths['rank']}, top-{widths['top_k']}, static width {width}"
        ),
        "dsc": lambda: (
            f"M {widths['num_atoms']}, K {widths['top_k']}, static width {width}"
            + ("" if router == "linear" else f", {router} router")
        ),
    }
    return describe[method]()
