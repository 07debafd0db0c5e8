"""The linear router and the low-rank router."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from torchdsc.arguments import check_at_least, check_types
from torchdsc.nn.atom_rows import AtomRows
from torchdsc.nn.options import RouterNorm
from torchdsc.ops import Selection, route, select

from .base import Router, parameter_like


class LinearRouter(Router, AtomRows):
    """``r = norm(x) W_r``, with one logit per atom.

    Args:
        in_features: d_in.
        num_atoms: M.
        bias: Whether the logits have a bias, zero at the start.
        norm: "layer" (parameter-free LayerNorm), "layer_affine" or "none".
        init_std: Standard deviation of the initial weight; by default that of the model, or 0.02.
        device: Where the parameters live.
        dtype: Their dtype.

    Attributes:
        weight: W_r, stored as (M, d_in).

    Raises:
        TypeError: If an argument has another type.
        ValueError: If a size is below 1, ``init_std`` is not positive or ``norm`` is unknown.
    """

    atom_parameters = ("weight", "bias")

    def __init__(
        self,
        in_features: int,
        num_atoms: int,
        *,
        bias: bool = False,
        norm: RouterNorm = "layer",
        init_std: float | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_types(LinearRouter.__init__, locals())
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
        found = select(scores, top_k, logit_clamp=logit_clamp, token_mask=token_mask, statistics=statistics)
        return found._replace(log_normalizer=scores.logsumexp(-1)) if raw_normalizer and statistics else found

    def _select(
        self, x: Tensor, top_k: int, logit_clamp: float, token_mask: Tensor | None, statistics: bool
    ) -> Selection:
        x, weight, bias = self._operands(x)
        return route(
            x, weight, bias, top_k=top_k, logit_clamp=logit_clamp, token_mask=token_mask, statistics=statistics
        )

    def _operands(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Input, weight and bias of the linear map to logits, in the dtype of ``x``."""
        bias = None if self.bias is None else parameter_like(self.all_rows("bias"), x)
        return x, parameter_like(self.all_rows("weight"), x), bias


class LowRankRouter(LinearRouter):
    """``r = (norm(x) A^T) B^T``: d r + r M parameters and multiplications, instead of d M of the linear router.

    Args:
        in_features: d_in.
        num_atoms: M.
        rank: r >= 1.
        bias: Whether the logits have a bias, zero at the start.
        norm: "layer" (parameter-free LayerNorm), "layer_affine" or "none".
        init_std: Logits are initialised to the standard deviation they would have in a linear router whose weight has
            this one.
        device: Where the parameters live.
        dtype: Their dtype.

    Attributes:
        down: A, of shape (r, d_in).
        weight: B, of shape (M, r).

    Raises:
        TypeError: If an argument has another type.
        ValueError: If ``rank`` is below 1, or as :class:`LinearRouter`.
    """

    def __init__(
        self,
        in_features: int,
        num_atoms: int,
        *,
        rank: int,
        bias: bool = False,
        norm: RouterNorm = "layer",
        init_std: float | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_types(LowRankRouter.__init__, locals())
        check_at_least(1, rank=rank)
        Router.__init__(self, in_features, num_atoms, norm, init_std, device, dtype)
        self.rank = rank
        self.down = nn.Parameter(torch.empty(rank, in_features, device=device, dtype=dtype))
        self.weight = nn.Parameter(torch.empty(num_atoms, rank, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(num_atoms, device=device, dtype=dtype)) if bias else None
        self.reset_parameters()

    def deviations(self, init_std: float) -> list[tuple[nn.Parameter, float]]:
        """A maps normalised tokens to features of variance 1; B sets the standard deviation of the logits."""
        width = self.in_features
        return [(self.down, 1 / math.sqrt(width)), (self.weight, init_std * math.sqrt(width / self.rank))]

    def _operands(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        return super()._operands(functional.linear(x, parameter_like(self.down, x)))

    def extra_repr(self) -> str:
        """Sizes, for ``print(model)``."""
        return f"{super().extra_repr()}, rank={self.rank}"
