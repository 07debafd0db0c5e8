"""The public functions: check their arguments, and pass a method's targets to its solver."""

from __future__ import annotations

from math import floor
from typing import TYPE_CHECKING, Any

from .plan import METHODS, Budget, Plan
from .solvers import solve_atoms, solve_dense, solve_moe, solve_router
from .targets import Targets

if TYPE_CHECKING:
    from torchdsc.models.options import FeedForwardKind

# What the solver sets itself, so that no option of the same name is dropped in silence.
_WIDTHS: dict[str, set[str]] = {
    "dense": set(),
    "moe": {"num_experts", "top_k"},
    "mixture_of_loras": {"num_experts", "rank", "top_k"},
    "peer": {"num_experts", "top_k"},
    "dsc": {"num_atoms", "top_k"},
}


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
    (2 D parameters, 2 r D for experts of rank r); the plan says by how much it misses. With product keys M, or N for
    PEER, is a square, and the plan stays below both targets or next to them.

    Args:
        method: "dense", "moe", "mixture_of_loras", "peer" or "dsc".
        budget: Targets and sizes.
        top_k: Atoms or experts per token; 2 for MoE, 4 for others by default.
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
    targets = Targets(budget, total, active, source, dict(options or {}))
    if method == "dense":
        return solve_dense(targets)
    if method == "moe":
        return solve_moe(targets, top_k or 2)
    is_linear = targets.options.get("router", "linear") == "linear"
    if method == "peer" or not is_linear or any(targets.options.get(name) for name in ("share_bank", "attention_rank")):
        return solve_router(targets, method, top_k or 4)
    return solve_atoms(targets, method, top_k or 4, 1 if method == "dsc" else rank)


def solve_all(
    budget: Budget,
    *,
    top_k: int = 4,
    rank: int = 1,
    experts_per_token: int = 2,
    dsc_options: dict[str, Any] | None = None,
) -> list[Plan]:
    """Plans of the comparison's four methods; see :func:`solve`. ``dsc_options`` are further options of DSC."""
    return [
        solve("dense", budget),
        solve("moe", budget, top_k=experts_per_token),
        solve("mixture_of_loras", budget, top_k=top_k, rank=rank),
        solve("dsc", budget, top_k=top_k, options=dsc_options),
    ]
