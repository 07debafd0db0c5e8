"""The public functions: check their arguments, and pass a method's targets to its solver."""

from __future__ import annotations

from math import floor
from typing import Any

from torchdsc.baselines.methods import METHODS
from torchdsc.kinds import FeedForwardKind

from .plan import Budget, Plan
from .solvers import SOLVERS
from .targets import Targets


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
        method: One of :data:`METHODS`.
        budget: Targets and sizes.
        top_k: Atoms or experts per token; 2 for MoE, 4 for others by default.
        rank: Of Mixture-of-LoRAs.
        match: Another method's plan whose realised numbers replace the targets.
        options: Further feed-forward options, counted with the rest where they have parameters; for example those of
            :func:`torchdsc.recommended`, whose ``top_k`` is taken where none is given.

    Returns:
        The plan.

    Raises:
        TypeError: If an option that concerns the model around the layer has another type.
        ValueError: If the method is unknown, an option is the solver's to choose, or a target infeasible: it
            says which, and the nearest feasible one.
    """
    if method not in METHODS:
        raise ValueError(f"method must be one of {tuple(METHODS)}, got {method!r}")
    options = dict(options or {})
    top_k = options.pop("top_k", None) if top_k is None else top_k
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k must be >= 1, got {top_k}")
    if rank < 1:
        raise ValueError(f"rank must be >= 1, got {rank}")
    widths, form = METHODS[method].widths, METHODS[method].form
    chosen = sorted(set(widths) & set(options))
    if chosen:
        raise ValueError(f"options of {method} must leave {', '.join(sorted(widths))} to the solver, got {chosen}")
    total = floor(budget.total) if match is None else match.params_total
    active = floor(budget.active) if match is None else match.params_active
    source = "" if match is None else f" (realised by {match.method})"
    top_k, rank = top_k or (2 if form == "experts" else 4), rank if "rank" in widths else 1
    targets = Targets(budget, method, total, active, source, top_k, rank, options)
    targets.model.check_atoms(top_k)
    return SOLVERS[form](targets)


def solve_all(
    budget: Budget,
    *,
    top_k: int = 4,
    rank: int = 1,
    experts_per_token: int = 2,
    dsc_options: dict[str, Any] | None = None,
    refused: dict[str, str] | None = None,
) -> list[Plan]:
    """Plans of the comparison's four methods; see :func:`solve`.

    Args:
        budget: Targets and sizes.
        top_k: Of DSC and Mixture-of-LoRAs.
        rank: Of Mixture-of-LoRAs.
        experts_per_token: Of MoE.
        dsc_options: Further options of DSC; their ``top_k``, if they have one, goes before the other.
        refused: Takes the errors of methods other than DSC that have no plan, by method; by default the first is
            raised.

    Raises:
        ValueError: See :func:`solve`; with ``refused``, if DSC has no plan.
    """
    own = dsc_options or {}
    requests: dict[FeedForwardKind, dict[str, Any]] = {
        "dense": {},
        "moe": {"top_k": experts_per_token},
        "mixture_of_loras": {"top_k": top_k, "rank": rank},
        "dsc": {"top_k": None if "top_k" in own else top_k, "options": own},
    }
    plans, errors = [], dict[str, ValueError]()
    for method, arguments in requests.items():
        try:
            plans.append(solve(method, budget, **arguments))
        except ValueError as error:
            errors[method] = error
    if errors and (refused is None or "dsc" in errors):
        raise next(iter(errors.values()))
    if refused is not None:
        refused.update({method: str(error) for method, error in errors.items()})
    return plans
