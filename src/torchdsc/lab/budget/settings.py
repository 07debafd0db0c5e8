"""A plan for the feed-forward layer that a run's settings describe."""

from __future__ import annotations

from typing import Any, Protocol

from torchdsc.baselines.methods import METHODS
from torchdsc.kinds import FeedForwardKind

from .api import solve
from .plan import Budget, Plan


class LayerSettings(Protocol):
    """The settings of a feed-forward layer, as the settings of tasks describe them."""

    method: FeedForwardKind
    feed_forward: dict[str, Any]
    match: FeedForwardKind | None
    top_k: int
    rank: int
    experts_per_token: int


def solve_settings(settings: LayerSettings, budget: Budget) -> Plan:
    """Solve a budget for the method of a run.

    Args:
        settings: Of the run.
        budget: Targets and sizes; with ``match``, what that method realises without options replaces the targets.

    Raises:
        TypeError: If an option has another type.
        ValueError: If a target is infeasible.
    """

    def plan(method: FeedForwardKind, match: Plan | None, options: dict[str, Any]) -> Plan:
        top_k = settings.experts_per_token if METHODS[method].form == "experts" else settings.top_k
        return solve(method, budget, top_k=top_k, rank=settings.rank, match=match, options=options)

    if settings.match is None:
        return plan(settings.method, None, settings.feed_forward)
    match = plan(settings.match, None, {})
    if settings.match == settings.method and not settings.feed_forward:
        return match
    return plan(settings.method, match, settings.feed_forward)
