"""Targets in whole parameters, the plans that are made for them, and the refusal of what is infeasible."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .plan import Budget, Plan, feed_forward_parameters

if TYPE_CHECKING:
    from torchdsc.models.options import FeedForwardKind


@dataclass(frozen=True)
class Targets:
    """Targets of the whole model in whole parameters: the arithmetic below is exact."""

    budget: Budget
    total: int
    active: int
    source: str
    options: dict[str, Any]

    @property
    def fixed(self) -> int:
        """Parameters outside the feed-forward layers: those of the budget, and contexts."""
        # Imported late: the command line shows its help before this loads.
        from torchdsc.models.options import split_options

        return self.budget.fixed + split_options("dsc", self.options)[0].context_rows * self.unit

    @property
    def stored(self) -> int:
        """Parameters that the total leaves to all feed-forward layers together."""
        return self.total - self.fixed

    @property
    def used(self) -> int:
        """Parameters that the active target leaves to them."""
        return self.active - self.fixed

    @property
    def unit(self) -> int:
        """D parameters in every layer: what widths and counts come in."""
        return self.budget.d_model * self.budget.n_layer

    def plan(self, method: FeedForwardKind, width: int, widths: dict[str, Any]) -> Plan:
        """The plan of these widths, and by how much it misses."""
        options = {**self.options, **widths}
        d_model, layers, fixed = self.budget.d_model, self.budget.n_layer, self.fixed
        stored, used = feed_forward_parameters(method, d_model, width, options, layers)
        return Plan(
            method=method,
            intermediate_size=width,
            options=options,
            params_total=fixed + stored,
            params_active=fixed + used,
            miss_total=stored / self.stored - 1,
            miss_active=None if method == "dense" else used / self.used - 1,
            description=_describe(method, width, options),
        )

    def check_total(self, least: int, why: str) -> None:
        """Raise unless the total is at least ``least`` units, what a method's smallest layer takes, and the active."""
        nearest = self.fixed + least * self.unit
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
            nearest = self.fixed + least
            raise ValueError(f"active must be at least {nearest:,} for {why}, got {self.active:,}{self.source}")


def _describe(method: FeedForwardKind, width: int, widths: dict[str, Any]) -> str:
    router = widths.get("router", "linear")
    describe: dict[str, Callable[[], str]] = {
        "dense": lambda: f"width {width}",
        "moe": lambda: (
            f"{widths['num_experts']} experts of {width}, top-{widths['top_k']}"
            + (f", {widths['shared_experts']} shared" if widths.get("shared_experts") else "")
        ),
        "mixture_of_loras": lambda: (
            f"{widths['num_experts']} experts of rank {widths['rank']}, top-{widths['top_k']}, static width {width}"
        ),
        "peer": lambda: f"{widths['num_experts']} experts of one neuron, top-{widths['top_k']}, static width {width}",
        "dsc": lambda: (
            f"M {widths['num_atoms']}{' shared' if widths.get('share_bank') else ''}, K {widths['top_k']}, "
            f"static width {width}"
            + ("" if router == "linear" else f", {router} router")
            + (f", attention by rank {widths['attention_rank']}" if widths.get("attention_rank") else "")
        ),
    }
    context, around = widths.get("router_context", 1), widths.get("input_context", 1)
    routed = widths.get("router_input") == "embeddings"
    seen = {
        f"context of {context} tokens": context > 1 and not routed,
        f"routed by embeddings of {context} tokens": routed and context > 1,
        "routed by embeddings": routed and context == 1,
        f"sees embeddings of {around} tokens": around > 1,
    }
    return ", ".join([describe[method](), *(words for words, holds in seen.items() if holds)])
