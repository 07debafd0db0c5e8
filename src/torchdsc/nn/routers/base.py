"""What routers share. A router is a module of its own, so that hooks see its scores."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from torchdsc.arguments import check_at_least, check_positive, check_types
from torchdsc.nn.options import RouterNorm
from torchdsc.ops import Selection


class Router(nn.Module):
    """What routers share: their norm, and arithmetic in float32 (float64 for float64 input), also under autocast.

    Subclasses implement :meth:`scores`, :meth:`select_from` and :meth:`deviations`, and may select
    without forming scores in :meth:`_select`.

    Args:
        in_features: d_in.
        num_atoms: M.
        norm: "layer" (parameter-free LayerNorm), "layer_affine" or "none".
        init_std: Standard deviation of a linear router's initial weight; others start with logits of its spread. By
            default that of the model around it, or 0.02.
        device: Where the parameters live.
        dtype: Their dtype.

    Raises:
        TypeError: If an argument has another type.
        ValueError: If a size is below 1, ``init_std`` is not positive or ``norm`` is unknown.
    """

    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        num_atoms: int,
        norm: RouterNorm = "layer",
        init_std: float | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_types(Router.__init__, locals())
        check_at_least(1, in_features=in_features, num_atoms=num_atoms)
        check_positive(init_std=init_std)
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
        for parameter, deviation in self.deviations(0.02 if self.init_std is None else self.init_std):
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


def _full_precision(x: Tensor) -> AbstractContextManager[Any]:
    """Autocast switched off; nothing where it is off, as entering costs more than a token's selection."""
    if torch.is_autocast_enabled(x.device.type):
        return torch.autocast(x.device.type, enabled=False)
    return nullcontext()


def cast_like(tensor: Tensor | None, like: Tensor) -> Tensor | None:
    """``tensor`` in the dtype of ``like``."""
    return tensor if tensor is None or tensor.dtype == like.dtype else tensor.to(like.dtype)
