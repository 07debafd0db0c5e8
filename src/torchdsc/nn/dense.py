"""The dense feed-forward layer of a GPT block."""

import torch
from torch import Tensor, nn
from torch.nn import functional

from torchdsc.arguments import check_at_least, check_types


class DenseFFN(nn.Module):
    """``y = gelu(x W_1) W_2``, without biases.

    Args:
        in_features: d.
        hidden_features: Width h.
        device: Where the parameters live.
        dtype: Their dtype.

    Raises:
        TypeError: If a size is no int.
        ValueError: If a size is below 1.
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_types(DenseFFN.__init__, locals())
        check_at_least(1, in_features=in_features, hidden_features=hidden_features)
        self.up = nn.Linear(in_features, hidden_features, bias=False, device=device, dtype=dtype)
        self.down = nn.Linear(hidden_features, in_features, bias=False, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens of shape (..., d) to (..., d)."""
        y: Tensor = self.down(functional.gelu(self.up(x)))
        return y
