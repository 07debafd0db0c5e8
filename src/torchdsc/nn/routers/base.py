"""The base class of routers. A router is a module of its own, so that forward hooks see what it selects."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from torchdsc.arguments import check_at_least, check_positive, check_types
from torchdsc.nn.options import RouterNorm
from torchdsc.nn.sharding import whole
from torchdsc.ops import Selection


class Router(nn.Module):
    """Base class of routers: the norm, and arithmetic in float32 (float64 for float64 input), also under autocast.

    Subclasses implement :meth:`scores`, :meth:`select_from` and :meth:`deviations`, and may override :meth:`_select` to
    select without forming all scores.

    Args:
        in_features: d_in.
        num_atoms: M.
        norm: "layer" (parameter-free LayerNorm), "layer_affine" or "none".
        init_std: Standard deviation of a linear router's initial weight; other routers are initialised to logits of the
            same standard deviation. By default that of the model, or 0.02.
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
            else nn.LayerNorm(in_features, elementwise_affine=False)
            if norm == "layer"
            else _AffineLayerNorm(in_features, device=device, dtype=dtype)
        )

    def deviations(self, init_std: float) -> list[tuple[nn.Parameter, float]]:
        """Normally initialised parameters, each with the standard deviation that ``init_std`` asks for."""
        raise NotImplementedError

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialise again: weights by :meth:`deviations`, bias to zero, LayerNorm to the identity."""
        for parameter, deviation in self.deviations(0.02 if self.init_std is None else self.init_std):
            nn.init.normal_(parameter, std=deviation)
        if self.bias is not None:
            nn.init.zeros_(self.bias)
        if isinstance(self.norm, nn.LayerNorm):
            self.norm.reset_parameters()

    def forward(
        self,
        x: Tensor,
        top_k: int | None = None,
        *,
        logit_clamp: float = 20.0,
        token_mask: Tensor | None = None,
        statistics: bool = False,
        raw_normalizer: bool = False,
    ) -> Selection | Tensor:
        """Select each token's top-K atoms, without forming all scores where that is possible.

        Args:
            x: Tokens of shape (T, d_in).
            top_k: K; None to return the :meth:`scores` of tokens of shape (..., d_in) instead of a selection.
            logit_clamp: tau > 0.
            token_mask: Optional bool of shape (T,); tokens that are False do not count in ``probability_sum``.
            statistics: Whether to fill ``log_normalizer`` and ``probability_sum``; they are empty otherwise.
            raw_normalizer: Compute ``log_normalizer`` from unclamped logits.

        Returns:
            The selection, or the scores, in float32 (float64 for float64 input).
        """
        with _full_precision(x):
            x = self._normalized(x)
            if top_k is None:
                return self.scores(x)
            if not raw_normalizer:
                return self._select(x, top_k, logit_clamp, token_mask, statistics)
            return self.select_from(
                self.scores(x),
                top_k,
                logit_clamp=logit_clamp,
                token_mask=token_mask,
                statistics=statistics,
                raw_normalizer=True,
            )

    def scores(self, x: Tensor) -> Tensor:
        """Scores of normalised tokens, from which atoms are selected."""
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
        """Select by the scores of T tokens; arguments as in :meth:`forward`."""
        raise NotImplementedError

    def _select(
        self, x: Tensor, top_k: int, logit_clamp: float, token_mask: Tensor | None, statistics: bool
    ) -> Selection:
        """Select for normalised tokens; a subclass may avoid forming all scores."""
        return self.select_from(
            self.scores(x), top_k, logit_clamp=logit_clamp, token_mask=token_mask, statistics=statistics
        )

    def _normalized(self, x: Tensor) -> Tensor:
        precise = x.dtype if x.dtype in (torch.float32, torch.float64) else torch.float32
        x = x if x.dtype == precise else x.to(precise)
        norm = self.norm
        if type(norm) is nn.LayerNorm:
            # It has no parameters to gather, so its module need not be called.
            return functional.layer_norm(x, norm.normalized_shape, eps=norm.eps)
        return x if type(norm) is nn.Identity else norm(x)

    def extra_repr(self) -> str:
        """Sizes, for ``print(model)``."""
        return f"in_features={self.in_features}, num_atoms={self.num_atoms}"


def _full_precision(x: Tensor) -> AbstractContextManager[Any]:
    """Switch autocast off, if it is on: entering the context costs more than a token's selection."""
    # Meta tensors have no autocast.
    if x.device.type != "meta" and torch.is_autocast_enabled(x.device.type):
        return torch.autocast(x.device.type, enabled=False)
    return nullcontext()


class _AffineLayerNorm(nn.LayerNorm):
    """LayerNorm in the dtype of the input, whatever the dtype of its parameters."""

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = parameter_like(self.weight, x), parameter_like(self.bias, x)
        return functional.layer_norm(x, self.normalized_shape, weight, bias, self.eps)


def parameter_like(parameter: Tensor, like: Tensor) -> Tensor:
    """The whole parameter, even if FSDP shards it, in the dtype of ``like``."""
    parameter = whole(parameter)
    return parameter if parameter.dtype == like.dtype else parameter.to(like.dtype)
