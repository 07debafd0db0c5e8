"""Budgets, plans that meet them, and counts of parameters."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from math import isfinite
from typing import Any

from torchdsc.arguments import own_copies
from torchdsc.baselines.methods import METHODS
from torchdsc.kinds import FeedForwardKind

# Plans that miss a target by more than this share of it are reported.
MISS_TO_SAY = 0.01


@dataclass(frozen=True)
class Budget:
    """Target parameters of a whole DSCGPT, or another model of such blocks, and the sizes that all methods share.

    Attributes:
        total: Stored parameters.
        active: Parameters that one token uses.
        d_model: Hidden size D.
        n_layer: Layers.
        vocab_size: Tokens of the tied embedding.
        n_positions: Learned positions.
        outside: Parameters outside the blocks and the final norm, for a model that is no DSCGPT; None for those of the
            embeddings of tokens and positions.
    """

    total: float
    active: float
    d_model: int
    n_layer: int
    vocab_size: int = 50304
    n_positions: int = 256
    outside: int | None = None

    def __post_init__(self) -> None:
        for name in ("total", "active", "d_model", "n_layer", "vocab_size", "n_positions"):
            value = getattr(self, name)
            if not (value > 0 and isfinite(value)):
                raise ValueError(f"{name} must be a finite number > 0, got {value}")
        if self.outside is not None and self.outside < 0:
            raise ValueError(f"outside must be >= 0, or None, got {self.outside}")

    @property
    def fixed(self) -> int:
        """Parameters outside the feed-forward layers: embeddings, attention 4 D^2 and norms 4 D a layer, final norm."""
        d = self.d_model
        outside = (self.vocab_size + self.n_positions) * d if self.outside is None else self.outside
        return outside + self.n_layer * (4 * d * d + 4 * d) + 2 * d


@dataclass(frozen=True)
class Plan:
    """A method's widths, and the numbers of parameters that they result in.

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

    def __post_init__(self) -> None:
        own_copies(self)

    @property
    def widths(self) -> dict[str, Any]:
        """What a run's record has of it beside the counts: widths, options, and by how much they miss."""
        names = ("intermediate_size", "options", "miss_total", "miss_active")
        return {name: value for name, value in asdict(self).items() if name in names}

    def __str__(self) -> str:
        """The widths, and what they come to."""
        sizes = f"{self.params_total / 1e6:.3f} M stored, {self.params_active / 1e6:.3f} M active"
        return f"{self.description}; {sizes}"


def describe_misses(plan: Plan, budget: Budget, match: str | None = None) -> list[str]:
    """Report a plan that misses a target by more than the share :data:`MISS_TO_SAY` of it.

    Args:
        plan: The plan.
        budget: With the targets.
        match: The method whose realised numbers took the place of the targets, if one did.

    Returns:
        A line for each target that is missed, with what was reached.
    """
    why = f"; match = {match!r} gives the numbers" if match else ""
    # All of dense is active.
    targets = ("total",) if plan.miss_active is None else ("total", "active")
    lines = []
    for target in targets:
        asked, reached = getattr(budget, target), getattr(plan, f"params_{target}")
        if abs(reached / asked - 1) > MISS_TO_SAY:
            lines.append(f"{target} = {asked:,.0f} is missed: {reached:,} ({reached / asked - 1:+.1%}){why}")
    return lines


def feed_forward_parameters(
    method: FeedForwardKind, d_model: int, intermediate_size: int, options: dict[str, Any], n_layer: int = 1
) -> tuple[int, int]:
    """Stored and active parameters of feed-forward layers, counted on the built module.

    An update of attention from a DSC layer's bank counts with it. Active ones are those of every layer, also where
    layers share a bank, which is stored once.

    Args:
        method: Which.
        d_model: D.
        intermediate_size: Width.
        options: Feed-forward options.
        n_layer: How many layers.

    Returns:
        The two counts.
    """
    # Imported late: the command line shows its help before these load.
    import torch

    from torchdsc.models.feed_forward import build_attention_update, build_feed_forward
    from torchdsc.models.options import split_options

    with torch.device("meta"):
        module: Any = build_feed_forward(method, d_model, intermediate_size, options)
        model, _ = split_options(method, options)
        layer = getattr(module, "dsc", module)
        update = build_attention_update(method, d_model, options, layer.bank) if model.attention_rank else None
    stored, idle = _count(module), METHODS[method].idle(layer)
    if update is not None:
        # Attention composes from the same atoms, K of its own.
        stored += _count(update) - _count(layer.bank)
        idle -= (layer.bank.in_features + layer.bank.out_features) * options["top_k"]
    shared = _count(layer.bank) if model.share_bank else 0
    return n_layer * stored - (n_layer - 1) * shared, n_layer * (stored - idle)


def _count(module: Any) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
