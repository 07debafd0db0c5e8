"""The budget solver: widths of each method for a target of total and active parameters."""

from collections.abc import Callable
from dataclasses import dataclass, field
from math import floor
from typing import Any

import torch

from torchdsc.models.feed_forward import FeedForwardKind, build_feed_forward

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
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be > 0, got {getattr(self, name)}")

    @property
    def fixed(self) -> int:
        """Parameters outside the feed-forward layers: embeddings, attention 4 D^2 and norms 4 D a layer, final norm."""
        d = self.d_model
        return (self.vocab_size + self.n_positions) * d + self.n_layer * (4 * d * d + 4 * d) + 2 * d

    def per_layer(self, target: float) -> float:
        """Feed-forward parameters of one layer that a target for the model leaves."""
        return (target - self.fixed) / self.n_layer


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
    (2 D parameters); the plan says by how much it misses.

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
        ValueError: If the method is unknown, or a target infeasible: it says which, and the nearest feasible one.
    """
    if method not in METHODS:
        raise ValueError(f"method must be one of {METHODS}, got {method!r}")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k must be >= 1, got {top_k}")
    if rank < 1:
        raise ValueError(f"rank must be >= 1, got {rank}")
    total = budget.per_layer(budget.total if match is None else match.params_total)
    active = budget.per_layer(budget.active if match is None else match.params_active)
    if total < 2 * budget.d_model:
        least = budget.fixed + 2 * budget.d_model * budget.n_layer
        raise ValueError(f"total must be at least {least:,} for these sizes, got {budget.total:,.0f}")
    targets = _Targets(budget, total, active, dict(options or {}))
    if method == "dense":
        return targets.plan(method, floor(total / (2 * budget.d_model)), {})
    if active > total:
        raise ValueError(f"active must be at most total = {budget.total:,.0f}, got {budget.active:,.0f}")
    if method == "moe":
        return _solve_moe(targets, top_k or 2)
    if method == "dsc":
        return _solve_rank_one(targets, "dsc", top_k or 4, 1)
    return _solve_rank_one(targets, "mixture_of_loras", top_k or 4, rank)


def solve_all(budget: Budget, *, top_k: int = 4, rank: int = 1, experts_per_token: int = 2) -> list[Plan]:
    """Plans of all four methods; see :func:`solve`."""
    return [
        solve("dense", budget),
        solve("moe", budget, top_k=experts_per_token),
        solve("mixture_of_loras", budget, top_k=top_k, rank=rank),
        solve("dsc", budget, top_k=top_k),
    ]


@dataclass(frozen=True)
class _Targets:
    budget: Budget
    total: float
    active: float
    options: dict[str, Any]

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
            miss_total=stored / self.total - 1,
            miss_active=None if method == "dense" else used / self.active - 1,
            description=_describe(method, width, widths),
        )

    def infeasible_active(self, least: float, why: str) -> ValueError:
        # Rounded up to a step of every width, so that the target named is feasible itself.
        step = 4 * self.budget.d_model
        nearest = self.budget.fixed + self.budget.n_layer * (floor(least / step) + 2) * step
        return ValueError(f"active must be at least {nearest:,} for {why}, got {self.budget.active:,.0f}")


def _solve_moe(targets: _Targets, top_k: int) -> Plan:
    d = targets.budget.d_model
    least = max(3, top_k + 1)

    def width(experts: int) -> int:
        return floor((targets.active - d * experts) / (2 * d * top_k))

    if width(least) < 1:
        raise targets.infeasible_active(2 * d * top_k + d * least, f"{least} experts of width 1")
    best, nearest = least, float("inf")
    for experts in range(least, floor(targets.active / d) + 1):
        if width(experts) < 1:
            break
        distance = abs(experts * (2 * d * width(experts) + d) - targets.total)
        if distance < nearest:
            best, nearest = experts, distance
    return targets.plan("moe", width(best), {"num_experts": best, "top_k": top_k})


def _solve_rank_one(targets: _Targets, method: FeedForwardKind, top_k: int, rank: int) -> Plan:
    """Stored 2 D H + (2 r + 1) D N, active 2 D H + D N + 2 r D K: two equations for N atoms or experts and width H."""
    d = targets.budget.d_model
    count = floor((targets.total - targets.active + 2 * top_k * rank * d) / (2 * rank * d))
    name = "num_atoms" if method == "dsc" else "num_experts"
    # Active parameters at width 0, with the count that the total then asks for.
    least = (targets.total + 2 * top_k * rank * (2 * rank + 1) * d) / (2 * rank + 1)
    if targets.active < least:
        raise targets.infeasible_active(least, f"a static layer beside {name} = {count} with top_k = {top_k}")

    def plan(count: int, width: int) -> Plan:
        widths = {name: count, "top_k": top_k} | ({} if method == "dsc" else {"rank": rank})
        return targets.plan(method, width, widths)

    # The paper floors both. Where that misses by more than the tolerance, look for the best widths around.
    if method == "dsc":
        start = floor((targets.total - 3 * d * count) / (2 * d))
    else:
        start = floor((targets.active - d * count - 2 * top_k * rank * d) / (2 * d))
    floored = plan(count, max(0, start))
    if _miss(floored) <= TOLERANCE:
        return floored
    around = [
        plan(count + i, start + j) for i in range(-2, 3) for j in range(-4, 5) if count + i >= top_k and start + j >= 0
    ]
    return min(around, key=_miss)


def _miss(plan: Plan) -> float:
    return max(abs(plan.miss_total), abs(plan.miss_active or 0.0))


def _describe(method: FeedForwardKind, width: int, widths: dict[str, Any]) -> str:
    describe: dict[str, Callable[[], str]] = {
        "dense": lambda: f"width {width}",
        "moe": lambda: f"{widths['num_experts']} experts of {width}, top-{widths['top_k']}",
        "mixture_of_loras": lambda: (
            f"{widths['num_experts']} experts of rank {widths['rank']}, top-{widths['top_k']}, static width {width}"
        ),
        "dsc": lambda: f"M {widths['num_atoms']}, K {widths['top_k']}, static width {width}",
    }
    return describe[method]()
