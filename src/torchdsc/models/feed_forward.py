"""The feed-forward layers that a DSCGPT chooses from."""

from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from torchdsc.baselines import PEER, DenseFFN, MixtureOfLoRAs, StandardMoE
from torchdsc.nn import DSC, BasisBank, DSCResidual

FeedForwardKind = Literal["dense", "moe", "mixture_of_loras", "peer", "dsc"]


@dataclass(frozen=True)
class ModelOptions:
    """Feed-forward options that concern the model around the layers.

    Attributes:
        share_bank: One bank for the DSC layers of all blocks.
        router_context: Tokens whose mix a router sees, a token's own and those before it; 1 for its own alone. A dense
            layer, which has no router, sees the mix itself.
        attention_rank: Rank of a router of its own, by which the bank of a block's DSC layer updates the output
            projection of its attention too; 0 leaves that as it is.
    """

    share_bank: bool = False
    router_context: int = 1
    attention_rank: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.share_bank, bool):
            raise ValueError(f"share_bank must be a bool, got {self.share_bank!r}")
        if type(self.router_context) is not int or self.router_context < 1:
            raise ValueError(f"router_context must be an int >= 1, got {self.router_context!r}")
        if type(self.attention_rank) is not int or self.attention_rank < 0:
            raise ValueError(f"attention_rank must be an int >= 0, got {self.attention_rank!r}")

    @property
    def context_rows(self) -> int:
        """Rows of d parameters that the context adds to a block."""
        return self.router_context if self.router_context > 1 else 0


def split_options(kind: FeedForwardKind, options: dict[str, Any]) -> tuple[ModelOptions, dict[str, Any]]:
    """Options of the model, and those that are left for its layers."""
    names = {"router_context", "share_bank", "attention_rank"} if kind == "dsc" else {"router_context"}
    own = {name: value for name, value in options.items() if name in names}
    return ModelOptions(**own), {name: value for name, value in options.items() if name not in names}


def build_feed_forward(
    kind: FeedForwardKind, hidden_size: int, intermediate_size: int, options: dict[str, Any]
) -> nn.Module:
    """Build one feed-forward layer.

    Args:
        kind: Which.
        hidden_size: d.
        intermediate_size: Width, see :class:`DSCGPTConfig`.
        options: Further arguments, see :class:`DSCGPTConfig`.

    Returns:
        A module from (..., d) to (..., d).

    Raises:
        ValueError: On an unknown kind, or options that the layer refuses.
    """
    _, options = split_options(kind, options)
    try:
        if kind == "dense":
            return DenseFFN(hidden_size, intermediate_size, **options)
        if kind == "moe":
            return StandardMoE(hidden_size, intermediate_size, **options)
        if kind == "mixture_of_loras":
            return DSCResidual(_static(hidden_size, intermediate_size), MixtureOfLoRAs(hidden_size, **options))
        if kind == "peer":
            return DSCResidual(_static(hidden_size, intermediate_size), PEER(hidden_size, **options))
        if kind == "dsc":
            return DSCResidual(_static(hidden_size, intermediate_size), DSC(hidden_size, **options))
    except TypeError as error:
        raise ValueError(f"feed_forward_options do not fit feed_forward={kind!r}: {error}") from error
    raise ValueError(f"feed_forward must be one of {get_args(FeedForwardKind)}, got {kind!r}")


def build_attention_update(kind: FeedForwardKind, options: dict[str, Any], bank: BasisBank) -> DSC | None:
    """The update of a block's attention output from its own ``bank``; None where none is asked for."""
    model, layer_options = split_options(kind, options)
    if not model.attention_rank:
        return None
    router = {"router": "low_rank", "router_rank": model.attention_rank, "router_heads": 1}
    return DSC(bank.in_features, bank=bank, **{**layer_options, **router})


def check_feed_forward(
    kind: FeedForwardKind, hidden_size: int, intermediate_size: int, options: dict[str, Any]
) -> None:
    """Raise what :func:`build_feed_forward` would, at no cost."""
    with torch.device("meta"):
        build_feed_forward(kind, hidden_size, intermediate_size, options)


class NoFeedForward(nn.Module):
    """The static layer of width 0: contributes nothing."""

    def forward(self, x: Tensor) -> Tensor:
        """Zeros of the shape of ``x``."""
        return torch.zeros_like(x)


def _static(hidden_size: int, intermediate_size: int) -> nn.Module:
    return DenseFFN(hidden_size, intermediate_size) if intermediate_size > 0 else NoFeedForward()
