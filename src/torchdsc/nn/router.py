"""Routers: from tokens to one logit per atom. A router is a module of its own, so that hooks can capture its logits."""

from typing import get_args

import torch
from torch import Tensor, nn
from torch.nn import functional

from .options import RouterNorm


class LinearRouter(nn.Module):
    """``r = norm(x) W_r``, with one logit per atom.

    The weight is stored as (M, d_in). Logits are float32 (float64 for float64 input), also under autocast.

    Args:
        in_features: d_in.
        num_atoms: M.
        bias: Whether the logits have a bias, zero at the start.
        norm: "layer" (parameter-free LayerNorm), "layer_affine" or "none".
        init_std: Standard deviation of the initial weight.
        device: Where the parameters live.
        dtype: Their dtype.

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
        super().__init__()
        if norm not in get_args(RouterNorm):
            raise ValueError(f"norm must be one of {get_args(RouterNorm)}, got {norm!r}")
        self.in_features, self.num_atoms, self.init_std = in_features, num_atoms, init_std
        self.norm = (
            nn.Identity()
            if norm == "none"
            else nn.LayerNorm(in_features, elementwise_affine=norm == "layer_affine", device=device, dtype=dtype)
        )
        self.weight = nn.Parameter(torch.empty(num_atoms, in_features, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(num_atoms, device=device, dtype=dtype)) if bias else None
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Normal weight of standard deviation ``init_std``; zero bias; LayerNorm to the identity."""
        nn.init.normal_(self.weight, std=self.init_std)
        if self.bias is not None:
            nn.init.zeros_(self.bias)
        if isinstance(self.norm, nn.LayerNorm):
            self.norm.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        """Logits of shape (..., M) for tokens of shape (..., d_in)."""
        precise = x.dtype if x.dtype in (torch.float32, torch.float64) else torch.float32
        if torch.is_autocast_enabled(x.device.type):
            with torch.autocast(x.device.type, enabled=False):
                return self._logits(x, precise)
        return self._logits(x, precise)

    def _logits(self, x: Tensor, precise: torch.dtype) -> Tensor:
        def cast(tensor: Tensor | None) -> Tensor | None:
            return tensor if tensor is None or tensor.dtype == precise else tensor.to(precise)

        x = x if x.dtype == precise else x.to(precise)
        norm = self.norm
        if isinstance(norm, nn.LayerNorm):
            x = functional.layer_norm(x, norm.normalized_shape, cast(norm.weight), cast(norm.bias), norm.eps)
        weight = cast(self.weight)
        assert weight is not None
        return functional.linear(x, weight, cast(self.bias))

    def extra_repr(self) -> str:
        """Sizes, for ``print(model)``."""
        return f"in_features={self.in_features}, num_atoms={self.num_atoms}, bias={self.bias is not None}"
