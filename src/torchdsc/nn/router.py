"""Routers: from tokens to scored and selected atoms. A router is a module of its own, so that hooks see its scores."""

import math
from contextlib import AbstractContextManager, nullcontext
from typing import Any, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional

from torchdsc.ops import Selection, route, select, select_product_key
from torchdsc.ops.select import largest

from .options import DSCOptions, RouterNorm


class Router(nn.Module):
    """What routers share: their norm, and arithmetic in float32 (float64 for float64 input), also under autocast.

    Subclasses implement :meth:`scores`, :meth:`select_from` and :meth:`deviations`, and may select
    without forming scores in :meth:`_select`.

    Args:
        in_features: d_in.
        num_atoms: M.
        norm: "layer" (parameter-free LayerNorm), "layer_affine" or "none".
        init_std: Standard deviation of a linear router's initial weight; others start with logits of its spread.
        device: Where the parameters live.
        dtype: Their dtype.

    Raises:
        ValueError: If ``norm`` is unknown.
    """

    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        num_atoms: int,
        norm: RouterNorm = "layer",
        init_std: float = 0.02,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if norm not in get_args(RouterNorm):
            raise ValueError(f"norm must be one of {get_args(RouterNorm)}, got {norm!r}")
        self.in_features, self.num_atoms, self.init_std = in_features, num_atoms, init_std
        self.register_parameter("bias", None)
        self.norm = (
            nn.Identity()
            if norm == "none"
            else nn.LayerNorm(in_features, elementwise_affine=norm == "layer_affine", device=device, dtype=dtype)
        )

    def deviations(self, init_std: float) -> list[tuple[nn.Parameter, float]]:
        """Parameters that start normal, with their standard deviations for a linear router's of ``init_std``."""
        raise NotImplementedError

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Normal weights of :meth:`deviations`; zero bias; LayerNorm to the identity."""
        for parameter, deviation in self.deviations(self.init_std):
            nn.init.normal_(parameter, std=deviation)
        if self.bias is not None:
            nn.init.zeros_(self.bias)
        if isinstance(self.norm, nn.LayerNorm):
            self.norm.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        """Scores of tokens x of shape (..., d_in); see :meth:`scores`."""
        with _full_precision(x):
            return self.scores(self._normalized(x))

    def scores(self, x: Tensor) -> Tensor:
        """What :meth:`forward` returns for tokens that have been normalised."""
        raise NotImplementedError

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
        """Selection by the scores of T tokens; arguments as in :meth:`select`."""
        raise NotImplementedError

    def select(
        self,
        x: Tensor,
        top_k: int,
        *,
        logit_clamp: float,
        token_mask: Tensor | None = None,
        statistics: bool = False,
        raw_normalizer: bool = False,
    ) -> Selection:
        """Select each token's top-K atoms; without forming all scores where no hook wants to see them.

        Args:
            x: Tokens of shape (T, d_in).
            top_k: K.
            logit_clamp: tau > 0.
            token_mask: Optional bool of shape (T,); tokens that are False do not count in ``probability_sum``.
            statistics: Whether to fill ``log_normalizer`` and ``probability_sum``; they are empty otherwise.
            raw_normalizer: Take ``log_normalizer`` of unclamped logits.

        Returns:
            The selection, in float32 (float64 for float64 input).
        """
        if not (raw_normalizer or self._forward_hooks or self._forward_pre_hooks):
            with _full_precision(x):
                found = self._select(self._normalized(x), top_k, logit_clamp, token_mask, statistics)
            if found is not None:
                return found
        return self.select_from(
            self(x),
            top_k,
            logit_clamp=logit_clamp,
            token_mask=token_mask,
            statistics=statistics,
            raw_normalizer=raw_normalizer,
        )

    def _select(
        self, x: Tensor, top_k: int, logit_clamp: float, token_mask: Tensor | None, statistics: bool
    ) -> Selection | None:
        return None

    def _normalized(self, x: Tensor) -> Tensor:
        precise = x.dtype if x.dtype in (torch.float32, torch.float64) else torch.float32
        x = x if x.dtype == precise else x.to(precise)
        norm = self.norm
        if isinstance(norm, nn.LayerNorm):
            weight, bias = cast_like(norm.weight, x), cast_like(norm.bias, x)
            return functional.layer_norm(x, norm.normalized_shape, weight, bias, norm.eps)
        return x

    def extra_repr(self) -> str:
        """Sizes, for ``print(model)``."""
        return f"in_features={self.in_features}, num_atoms={self.num_atoms}"


class LinearRouter(Router):
    """``r = norm(x) W_r``, with one logit per atom.

    Args:
        in_features: d_in.
        num_atoms: M.
        bias: Whether the logits have a bias, zero at the start.
        norm: "layer" (parameter-free LayerNorm), "layer_affine" or "none".
        init_std: Standard deviation of the initial weight.
        device: Where the parameters live.
        dtype: Their dtype.

    Attributes:
        weight: W_r, stored as (M, d_in).

    Raises:
        ValueError: If ``norm`` is unknown.
    """

    def __init__(
        self,
        in_features: int,
        num_atoms: int,
        *,
        bias: bool = False,
        norm: RouterNorm = "layer",
        init_std: float = 0.02,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, num_atoms, norm, init_std, device, dtype)
        self.weight = nn.Parameter(torch.empty(num_atoms, in_features, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(num_atoms, device=device, dtype=dtype)) if bias else None
        self.reset_parameters()

    def deviations(self, init_std: float) -> list[tuple[nn.Parameter, float]]:
        """See :class:`Router`."""
        return [(self.weight, init_std)]

    def scores(self, x: Tensor) -> Tensor:
        """Logits of shape (..., M)."""
        return functional.linear(*self._operands(x))

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
        """See :class:`Router`; scores are logits of shape (T, M)."""
        if not statistics:
            differentiable = torch.is_grad_enabled() or torch.compiler.is_compiling()
            values, indices = scores.topk(top_k) if differentiable else largest(scores, top_k)
            return Selection(values, indices, scores.new_empty(0), scores.new_empty(0))
        found = select(scores, top_k, logit_clamp=logit_clamp, token_mask=token_mask)
        return found._replace(log_normalizer=scores.logsumexp(-1)) if raw_normalizer else found

    def _select(
        self, x: Tensor, top_k: int, logit_clamp: float, token_mask: Tensor | None, statistics: bool
    ) -> Selection | None:
        x, weight, bias = self._operands(x)
        return route(
            x, weight, bias, top_k=top_k, logit_clamp=logit_clamp, token_mask=token_mask, statistics=statistics
        )

    def _operands(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """What the logits are the linear function of: input, weight (M, .) and bias, in the dtype of ``x``."""
        weight = self.weight if self.weight.dtype == x.dtype else self.weight.to(x.dtype)
        return x, weight, cast_like(self.bias, x)


class LowRankRouter(LinearRouter):
    """``r = (norm(x) A^T) B^T`` of rank r: d r + r M parameters and multiplications, against d M of the linear router.

    Args:
        in_features: d_in.
        num_atoms: M.
        rank: r >= 1.
        bias: Whether the logits have a bias, zero at the start.
        norm: "layer" (parameter-free LayerNorm), "layer_affine" or "none".
        init_std: The linear router's standard deviation whose logits this one's start with, in their spread.
        device: Where the parameters live.
        dtype: Their dtype.

    Attributes:
        down: A, of shape (r, d_in).
        weight: B, of shape (M, r).

    Raises:
        ValueError: If ``rank`` is below 1 or ``norm`` unknown.
    """

    def __init__(
        self,
        in_features: int,
        num_atoms: int,
        *,
        rank: int,
        bias: bool = False,
        norm: RouterNorm = "layer",
        init_std: float = 0.02,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if rank < 1:
            raise ValueError(f"rank must be >= 1, got {rank}")
        Router.__init__(self, in_features, num_atoms, norm, init_std, device, dtype)
        self.rank = rank
        self.down = nn.Parameter(torch.empty(rank, in_features, device=device, dtype=dtype))
        self.weight = nn.Parameter(torch.empty(num_atoms, rank, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(num_atoms, device=device, dtype=dtype)) if bias else None
        self.reset_parameters()

    def deviations(self, init_std: float) -> list[tuple[nn.Parameter, float]]:
        """A keeps the size of a normalised token; B makes the spread."""
        width = self.in_features
        return [(self.down, 1 / math.sqrt(width)), (self.weight, init_std * math.sqrt(width / self.rank))]

    def _operands(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        down = self.down if self.down.dtype == x.dtype else self.down.to(x.dtype)
        return super()._operands(functional.linear(x, down))

    def extra_repr(self) -> str:
        """Sizes, for ``print(model)``."""
        return f"{super().extra_repr()}, rank={self.rank}"


class ProductKeyRouter(Router):
    """``r_(i sqrt(M) + j) = clamp(a_i, +-tau/2) + clamp(b_j, +-tau/2)``, with a and b from the halves of a query.

    Each head makes a query ``norm(x) Q`` and compares its halves with sqrt(M) keys each: d q + sqrt(M) q parameters
    and multiplications a head for q features, against d M of the linear router. Heads select K / heads atoms each.

    Args:
        in_features: d_in.
        num_atoms: M, a square.
        rank: q, features of a head's query, even.
        heads: Queries, each with keys of its own.
        norm: "layer" (parameter-free LayerNorm), "layer_affine" or "none".
        init_std: The linear router's standard deviation whose logits this one's start with, in their spread.
        device: Where the parameters live.
        dtype: Their dtype.

    Attributes:
        query: Q, of shape (heads q, d_in).
        keys: Shape (heads, 2, sqrt(M), q / 2).

    Raises:
        ValueError: If ``num_atoms`` is no square, ``rank`` odd or below 2, ``heads`` below 1, or ``norm`` unknown.
    """

    def __init__(
        self,
        in_features: int,
        num_atoms: int,
        *,
        rank: int,
        heads: int = 1,
        norm: RouterNorm = "layer",
        init_std: float = 0.02,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, num_atoms, norm, init_std, device, dtype)
        self.side = math.isqrt(num_atoms)
        if self.side * self.side != num_atoms:
            nearest = f"{self.side**2} or {(self.side + 1) ** 2}"
            raise ValueError(f"num_atoms must be a square for product keys, for example {nearest}, got {num_atoms}")
        if rank < 2 or rank % 2:
            raise ValueError(f"rank must be even and >= 2 for product keys, got {rank}")
        if heads < 1:
            raise ValueError(f"heads must be >= 1, got {heads}")
        self.rank, self.heads = rank, heads
        self.query = nn.Parameter(torch.empty(heads * rank, in_features, device=device, dtype=dtype))
        self.keys = nn.Parameter(torch.empty(heads, 2, self.side, rank // 2, device=device, dtype=dtype))
        self.reset_parameters()

    def deviations(self, init_std: float) -> list[tuple[nn.Parameter, float]]:
        """Q keeps the size of a normalised token; a logit is a sum over the q features of both halves."""
        width = self.in_features
        return [(self.query, 1 / math.sqrt(width)), (self.keys, init_std * math.sqrt(width / self.rank))]

    def scores(self, x: Tensor) -> Tensor:
        """Both halves' scores, of shape (..., heads, 2, sqrt(M))."""
        query, keys = (t if t.dtype == x.dtype else t.to(x.dtype) for t in (self.query, self.keys))
        halves = functional.linear(x, query).view(-1, self.heads * 2, self.rank // 2)
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
        """See :class:`Router`; scores are those of both halves, of shape (T, heads, 2, sqrt(M))."""
        left, right = scores.unbind(-2)
        found = select_product_key(
            left, right, top_k, logit_clamp=logit_clamp, token_mask=token_mask, statistics=statistics
        )
        if raw_normalizer and statistics:
            return found._replace(log_normalizer=left.logsumexp(-1) + right.logsumexp(-1))
        return found

    def extra_repr(self) -> str:
        """Sizes, for ``print(model)``."""
        return f"{super().extra_repr()}, rank={self.rank}, heads={self.heads}"


def build_router(
    in_features: int,
    options: DSCOptions,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> Router:
    """The router that ``options`` ask for.

    Args:
        in_features: d_in.
        options: Those of the layer.
        device: Where the parameters live.
        dtype: Their dtype.

    Returns:
        A new router.
    """
    placed: dict[str, Any] = {"norm": options.router_norm, "device": device, "dtype": dtype}
    if options.router == "product_key":
        rank = options.router_rank or 2 * max(1, in_features // 4)
        return ProductKeyRouter(in_features, options.num_atoms, rank=rank, heads=options.router_heads, **placed)
    placed["bias"] = options.router_bias
    if options.router == "low_rank":
        return LowRankRouter(
            in_features, options.num_atoms, rank=options.router_rank or max(1, in_features // 4), **placed
        )
    return LinearRouter(in_features, options.num_atoms, **placed)


def _full_precision(x: Tensor) -> AbstractContextManager[Any]:
    """Autocast switched off; nothing where it is off, as entering costs more than a token's selection."""
    if torch.is_autocast_enabled(x.device.type):
        return torch.autocast(x.device.type, enabled=False)
    return nullcontext()


def cast_like(tensor: Tensor | None, like: Tensor) -> Tensor | None:
    """``tensor`` in the dtype of ``like``."""
    return tensor if tensor is None or tensor.dtype == like.dtype else tensor.to(like.dtype)
