"""Targets in whole numbers of parameters, plans for them, and errors for infeasible ones."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from torchdsc.baselines.methods import METHODS
from torchdsc.kinds import FeedForwardKind

from .plan import Budget, Plan, feed_forward_parameters

if TYPE_CHECKING:
    from torchdsc.models.options import ModelOptions


@dataclass(frozen=True)
class Targets:
    """Parameter targets of a whole model for one method. All numbers are ints, so that the arithmetic is exact."""

    budget: Budget
    method: FeedForwardKind
    total: int
    active: int
    source: str
    top_k: int
    rank: int
    options: dict[str, Any]

    @cached_property
    def model(self) -> ModelOptions:
        """The method's options that concern the model around its layers, where the static ones have some width."""
        # Imported late: the command line shows its help before this loads.
        from torchdsc.models.options import split_options

        options, _ = split_options(self.method, self.options)
        return options.beside(gate=options.static == "gated")

    @property
    def gate_context(self) -> int:
        """Those of the fixed parameters that only the gates of static layers use, and are none where the width is 0."""
        return (self.model.context_rows - self.model.beside(gate=False).context_rows) * self.unit

    @property
    def fixed(self) -> int:
        """Parameters outside the feed-forward layers, and those of short convolutions and n-gram tables."""
        return self.budget.fixed + self.model.context_rows * self.unit + self._tables[0]

    @property
    def fixed_active(self) -> int:
        """The active ones of them."""
        return self.fixed - self._tables[1]

    @cached_property
    def _tables(self) -> tuple[int, int]:
        """Stored and idle parameters of all n-gram tables."""
        if not self.model.ngram_rows:
            return 0, 0
        import torch

        with torch.device("meta"):
            tables = self.model.build_tables(self.budget.d_model, 0)
        assert tables is not None
        layers = self.budget.n_layer
        return layers * sum(parameter.numel() for parameter in tables.parameters()), layers * tables.idle

    @property
    def stored(self) -> int:
        """Parameters that the total leaves to all feed-forward layers together."""
        return self.total - self.fixed

    @property
    def used(self) -> int:
        """Parameters that the active target leaves to them."""
        return self.active - self.fixed_active

    @property
    def unit(self) -> int:
        """D parameters in every layer, the unit in which widths and numbers of atoms or experts are counted."""
        return self.budget.d_model * self.budget.n_layer

    @property
    def each_width(self) -> int:
        """Parameters of a unit of width of the static layers: in each two matrices, or three if it is gated."""
        return (3 if self.model.static == "gated" else 2) * self.unit

    @property
    def count_name(self) -> str:
        """The option that says how many atoms or experts there are."""
        return METHODS[self.method].widths[0]

    def plan(self, width: int, count: int = 0) -> Plan:
        """The plan of a width and a count of atoms or experts, and by how much it misses."""
        method = METHODS[self.method]
        options = {**self.options, **dict(zip(method.widths, (count, self.top_k, self.rank), strict=False))}
        d_model, layers = self.budget.d_model, self.budget.n_layer
        stored, used = feed_forward_parameters(self.method, d_model, width, options, layers)
        unseen = 0 if width else self.gate_context
        return Plan(
            method=self.method,
            intermediate_size=width,
            options=options,
            params_total=self.fixed - unseen + stored,
            params_active=self.fixed_active - unseen + used,
            miss_total=stored / (self.stored + unseen) - 1,
            miss_active=None if method.form == "dense" else used / (self.used + unseen) - 1,
            description=self._describe(width, options),
        )

    def check_total(self, least: int, why: str) -> None:
        """Raise if the total is less than ``least`` units, the size of the method's smallest layer, or than active."""
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
            nearest = self.fixed_active + least
            raise ValueError(f"active must be at least {nearest:,} for {why}, got {self.active:,}{self.source}")

    def _describe(self, width: int, options: dict[str, Any]) -> str:
        method, router = METHODS[self.method], options.get("router", "linear")
        model = self.model if width else self.model.beside(gate=False)
        mixed = f" of {model.router_context} tokens" if model.router_context > 1 else ""
        by_embeddings = model.router_input == "embeddings"
        shared = " shared" if model.share_bank else ""
        words = {
            method.words.format(width=width, shared=shared, **options): True,
            f"{options.get('shared_experts')} shared": options.get("shared_experts"),
            "gated": options.get("gated"),
            "balanced by a bias": options.get("balancing") == "bias",
            f"{'gated' if model.static == 'gated' else 'static'} width {width}": method.form == "update",
            f"{router} router": router != "linear",
            f"attention by rank {model.attention_rank}": model.attention_rank > 0,
            f"routed by embeddings{mixed}": by_embeddings,
            f"context{mixed}": mixed and not by_embeddings,
            f"sees embeddings of {model.input_context} tokens": model.input_context > 1,
            f"n-gram tables of {model.ngram_rows} rows": model.ngram_rows > 0,
        }
        return ", ".join(text for text, holds in words.items() if holds)
