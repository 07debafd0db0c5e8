"""The feed-forward layers that a DSCGPT chooses from."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from torchdsc.baselines.methods import METHODS
from torchdsc.kinds import FeedForwardKind
from torchdsc.nn import DSC, BasisBank, Residual
from torchdsc.nn.residual import build_static

from .options import split_options


def build_feed_forward(
    kind: FeedForwardKind, hidden_size: int, intermediate_size: int, options: Mapping[str, Any]
) -> nn.Module:
    """Build one feed-forward layer.

    Args:
        kind: ``feed_forward`` of :class:`torchdsc.models.DSCGPTConfig`.
        hidden_size: d.
        intermediate_size: See :class:`torchdsc.models.DSCGPTConfig`.
        options: ``feed_forward_options`` there.

    Returns:
        A module from (..., d) to (..., d).

    Raises:
        ValueError: On an unknown kind, or options that the layer refuses.
    """
    if kind not in METHODS:
        raise ValueError(f"feed_forward must be one of {tuple(METHODS)}, got {kind!r}")
    method = METHODS[kind]
    try:
        model, options = split_options(kind, options)
        if method.form == "update":
            static: nn.Module = NoFeedForward()
            if intermediate_size:
                static = build_static(model.static, hidden_size, intermediate_size)
            return Residual(static, method.layer(hidden_size, **options))
        layer: nn.Module = method.layer(hidden_size, intermediate_size, **options)
        return layer
    except TypeError as error:
        raise ValueError(f"feed_forward_options do not fit feed_forward={kind!r}: {error}") from error


def build_attention_update(
    kind: FeedForwardKind, hidden_size: int, options: Mapping[str, Any], bank: BasisBank
) -> DSC | None:
    """The update of a block's attention output, which uses the block's ``bank``; None if not asked for."""
    model, layer_options = split_options(kind, options)
    if not model.attention_rank:
        return None
    router = {"router": "low_rank", "router_rank": model.attention_rank, "router_heads": 1}
    return DSC(hidden_size, bank=bank, **{**layer_options, **router})


def check_feed_forward(
    kind: FeedForwardKind, hidden_size: int, intermediate_size: int, options: Mapping[str, Any]
) -> None:
    """Raise the errors of :func:`build_feed_forward`, and those of an update of attention, without allocating any."""
    with torch.device("meta"):
        module = build_feed_forward(kind, hidden_size, intermediate_size, options)
        layer = module.dsc if isinstance(module, Residual) else module
        if isinstance(layer, DSC):
            build_attention_update(kind, hidden_size, options, layer.bank)


class NoFeedForward(nn.Module):
    """A static layer of width 0, which outputs zeros."""

    def forward(self, x: Tensor) -> Tensor:
        """Zeros of the shape of ``x``."""
        return torch.zeros_like(x)
