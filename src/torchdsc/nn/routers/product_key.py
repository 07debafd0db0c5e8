"""The product-key router."""

import math
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from torchdsc.arguments import check_at_least, check_types
from torchdsc.nn.options import RouterNorm
from torchdsc.ops import Selection, select_product_key

from .base import Router, parameter_like
from .query_norm import QueryBatchNorm

QueryNorm = Literal["none", "batch"]


class ProductKeyRouter(Router):
    """``r_(i sqrt(M) + j) = clamp(a_i, +-tau/2) + clamp(b_j, +-tau/2)``, with a and b from the halves of a query.

    Each head computes a query ``norm(x) Q`` of q features, and scores each half of it against sqrt(M) keys. That is
    d q + sqrt(M) q parameters and multiplications per head, instead of d M of the linear router. Each head selects
    K / heads atoms.

    Args:
        in_features: d_in.
        num_atoms: M, a square.
        rank: q, features of a head's query, even.
        heads: Number of heads, each with its own query and keys.
        norm: "layer" (parameter-free LayerNorm), "layer_affine" or "none".
        query_norm: "batch" for BatchNorm of each feature of the queries, as published: in training a token's selection
            then depends on the others of its pass that ``token_mask`` counts (with ``raw_normalizer``, on all of them).
        init_std: Logits are initialised to the standard deviation they would have in a linear router whose weight has
            this one.
        device: Where the parameters live.
        dtype: Their dtype.

    Attributes:
        query: Q, of shape (heads q, d_in).
        keys: Shape (heads, 2, sqrt(M), q / 2).
        query_norm: Over heads q features; None if there is none.

    Raises:
        TypeError: If an argument has another type.
        ValueError: If ``num_atoms`` is no square, ``rank`` odd or below 2, ``heads`` below 1, or ``norm`` or
            ``query_norm`` unknown.
    """

    query_norm: QueryBatchNorm | None

    def __init__(
        self,
        in_features: int,
        num_atoms: int,
        *,
        rank: int,
        heads: int = 1,
        norm: RouterNorm = "layer",
        query_norm: QueryNorm = "none",
        init_std: float | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_types(ProductKeyRouter.__init__, locals())
        super().__init__(in_features, num_atoms, norm, init_std, device, dtype)
        self.side = math.isqrt(num_atoms)
        if self.side * self.side != num_atoms:
            nearest = f"{self.side**2} or {(self.side + 1) ** 2}"
            raise ValueError(f"num_atoms must be a square for product keys, for example {nearest}, got {num_atoms}")
        if rank < 2 or rank % 2:
            raise ValueError(f"rank must be even and >= 2 for product keys, got {rank}")
        check_at_least(1, heads=heads)
        self.rank, self.heads = rank, heads
        self.query = nn.Parameter(torch.empty(heads * rank, in_features, device=device, dtype=dtype))
        self.keys = nn.Parameter(torch.empty(heads, 2, self.side, rank // 2, device=device, dtype=dtype))
        self.query_norm = None
        if query_norm == "batch":
            self.query_norm = QueryBatchNorm(heads * rank, device=device, dtype=dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """See :class:`Router`; the norm of queries starts as the identity."""
        super().reset_parameters()
        if self.query_norm is not None:
            self.query_norm.reset_parameters()

    def deviations(self, init_std: float) -> list[tuple[nn.Parameter, float]]:
        """Q maps normalised tokens to features of variance 1; a logit is a sum over the q features of both halves."""
        width = self.in_features
        return [(self.query, 1 / math.sqrt(width)), (self.keys, init_std * math.sqrt(width / self.rank))]

    def scores(self, x: Tensor, token_mask: Tensor | None = None) -> Tensor:
        """Both halves' scores, of shape (..., heads, 2, sqrt(M)); the mask is for the norm of queries."""
        query, keys = parameter_like(self.query, x), parameter_like(self.keys, x)
        queries = functional.linear(x, query)
        if self.query_norm is not None:
            queries = self.query_norm(queries, token_mask)
        halves = queries.view(-1, self.heads * 2, self.rank // 2)
        scores = torch.bmm(halves.transpose(0, 1), keys.flatten(0, 1).transpose(1, 2))
        return scores.transpose(0, 1).reshape(*x.shape[:-1], self.heads, 2, self.side)

    def select_from(
        self,
        scores: Tensor,
        top_k: int,
        *,
        logit_clamp: float,
        token_mask: Tensor | None = None,
        statistics: bool = False,
        raw_normalizer: bool = False,
    ) -> Selection:
        """See :class:`Router`; scores of both halves have shape (T, heads, 2, sqrt(M))."""
        left, right = scores.unbind(-2)
        found = select_product_key(
            left, right, top_k, logit_clamp=logit_clamp, token_mask=token_mask, statistics=statistics
        )
        if raw_normalizer and statistics:
            return found._replace(log_normalizer=left.logsumexp(-1) + right.logsumexp(-1))
        return found

    def _select(
        self, x: Tensor, top_k: int, logit_clamp: float, token_mask: Tensor | None, statistics: bool
    ) -> Selection:
        return self.select_from(
            self.scores(x, token_mask), top_k, logit_clamp=logit_clamp, token_mask=token_mask, statistics=statistics
        )

    def extra_repr(self) -> str:
        """Sizes, for ``print(model)``."""
        return f"{super().extra_repr()}, rank={self.rank}, heads={self.heads}"
