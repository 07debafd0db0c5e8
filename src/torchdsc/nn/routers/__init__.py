"""Routers, which select atoms for tokens."""

from typing import Any

import torch

from torchdsc.nn.options import DSCOptions

from .base import Router
from .linear import LinearRouter, LowRankRouter
from .ngram import NgramRouter, set_salt
from .product_key import ProductKeyRouter

__all__ = ["LinearRouter", "LowRankRouter", "NgramRouter", "ProductKeyRouter", "Router", "build_router", "set_salt"]


def build_router(
    in_features: int,
    options: DSCOptions,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> Router:
    """Build the router that ``options`` ask for.

    Args:
        in_features: d_in.
        options: The layer's options.
        device: Where the parameters live.
        dtype: Their dtype.

    Returns:
        A new router.
    """
    if options.router == "ngram":
        return NgramRouter(options.num_atoms)
    placed: dict[str, Any] = {"norm": options.router_norm, "init_std": options.router_init_std}
    placed |= {"device": device, "dtype": dtype}
    if options.router == "product_key":
        rank = options.router_rank or 2 * max(1, in_features // 4)
        return ProductKeyRouter(in_features, options.num_atoms, rank=rank, heads=options.router_heads, **placed)
    placed["bias"] = options.router_bias
    if options.router == "low_rank":
        return LowRankRouter(
            in_features, options.num_atoms, rank=options.router_rank or max(1, in_features // 4), **placed
        )
    return LinearRouter(in_features, options.num_atoms, **placed)
