"""PEER: experts of a single neuron, retrieved by product keys."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from torchdsc.arguments import check_at_least, check_positive, check_types
from torchdsc.nn import ProductKeyRouter, RegularizerWeights, RoutedLayer, Routing
from torchdsc.nn.options import RouterNorm
from torchdsc.nn.routers.product_key import QueryNorm
from torchdsc.nn.statistics import sum_statistics
from torchdsc.ops import compose, latents
from torchdsc.ops.compose.api import Implementation


class PEER(RoutedLayer):
    """``y = sum_heads sum_{e in top-k} p_e gelu(x . u_e) v_e``, arXiv 2407.04153; to be added to a static layer.

    Each head retrieves K / heads of N experts by product keys, and p is the softmax over those it retrieves.

    Args:
        in_features: d_in.
        out_features: d_out; ``in_features`` by default.
        num_experts: N, a square.
        top_k: Experts per token K, a multiple of ``heads``. Training needs at least 2 a head, as the weight of one
            would always be 1.
        heads: Number of heads, each with its own query and keys.
        query_features: Features of a head's query, even; by default d_in / 2, rounded down to an even number.
        router_norm: Normalisation before the queries: "layer" (LayerNorm without parameters), "layer_affine" or "none".
        query_norm: "batch" for BatchNorm of the queries, as published, see :class:`torchdsc.nn.ProductKeyRouter`.
        init_std: Standard deviation of initial rows u and v.
        aux_weight: Weight of L_aux, equation (9); PEER as published has no such term.
        z_weight: Weight of the router z-loss; likewise.
        impl: Implementation of the composition.
        device: Where the parameters live.
        dtype: Their dtype.

    Attributes:
        down: Rows u, of shape (N, d_in), normal of standard deviation ``init_std``, or ``d_in^-1/2``, at the start.
        up: Rows v, of shape (N, d_out), likewise with ``d_out^-1/2``.

    Raises:
        TypeError: If an argument has another type.
        ValueError: On an argument out of its range.
    """

    router: ProductKeyRouter
    # PEER does not clamp logits: none comes near this bound.
    logit_clamp = 1e4
    row_parameters = ("down", "up")

    def __init__(
        self,
        in_features: int,
        out_features: int | None = None,
        *,
        num_experts: int,
        top_k: int = 4,
        heads: int = 1,
        query_features: int | None = None,
        router_norm: RouterNorm = "layer",
        query_norm: QueryNorm = "none",
        init_std: float | None = None,
        aux_weight: float = 0.0,
        z_weight: float = 0.0,
        impl: Implementation = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_types(PEER.__init__, locals())
        out_features = in_features if out_features is None else out_features
        check_at_least(1, in_features=in_features, out_features=out_features)
        if heads < 1 or top_k < heads or top_k % heads:
            raise ValueError(f"top_k must be a multiple of heads = {heads}, got {top_k}")
        check_positive(init_std=init_std)
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.in_features, self.out_features, self.impl = in_features, out_features, impl
        self.init_std = init_std
        self.num_experts, self.top_k, self.heads = num_experts, top_k, heads
        self.regularizers = RegularizerWeights(aux=aux_weight, z=z_weight)
        if math.isqrt(max(num_experts, 0)) ** 2 != num_experts:
            raise ValueError(f"num_experts must be a square, for product keys, got {num_experts}")
        rank = 2 * max(1, in_features // 4) if query_features is None else query_features
        if rank < 2 or rank % 2:
            raise ValueError(f"query_features must be even and >= 2, got {rank}")
        self.router = ProductKeyRouter(
            in_features, num_experts, rank=rank, heads=heads, norm=router_norm, query_norm=query_norm, **factory
        )
        if top_k > heads * num_experts:
            raise ValueError(f"top_k must be at most heads x num_experts = {heads * num_experts}, got {top_k}")
        self.down = nn.Parameter(torch.empty(num_experts, in_features, **factory))
        self.up = nn.Parameter(torch.empty(num_experts, out_features, **factory))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Normal rows."""
        for rows in (self.down, self.up):
            nn.init.normal_(rows, std=rows.shape[1] ** -0.5 if self.init_std is None else self.init_std)

    @property
    def parameter_dtype(self) -> torch.dtype:
        """See :class:`torchdsc.nn.RoutedLayer`."""
        return self.down.dtype

    def _route(self, routed: Tensor, token_mask: Tensor | None) -> Routing:
        if self.training and torch.is_grad_enabled() and self.top_k == self.heads:
            raise ValueError(
                f"top_k must be at least 2 a head to train, got {self.top_k} for heads = {self.heads}: the weight of "
                "one would always be 1, and the router get no gradient from the task"
            )
        collect = self.training and self.regularizers.need_tokens
        found = self.router(routed, self.top_k, logit_clamp=self.logit_clamp, token_mask=token_mask, statistics=collect)
        weights = found.logits.unflatten(1, (self.heads, -1)).softmax(dim=-1).view_as(found.logits)
        strength, statistics = weights.sum(dim=-1), None
        if collect:
            statistics = sum_statistics(strength, found.log_normalizer, found.probability_sum, token_mask)
        return Routing(found.indices, weights, strength, found.logits, statistics)

    def _compose(self, flat: Tensor, routing: Routing) -> Tensor:
        weights = routing.coefficients
        latent = latents(flat, self.down, routing.indices)
        # gelu(a) = a Phi(a), with the normal distribution function Phi; compose multiplies by a.
        coefficients = weights * 0.5 * torch.erfc(-latent / math.sqrt(2))
        return compose(flat, self.down, self.up, routing.indices, coefficients, eps=None, impl=self.impl)
