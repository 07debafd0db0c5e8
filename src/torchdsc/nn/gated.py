"""The gated feed-forward layer, SwiGLU, whose gate may see another input."""

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from torchdsc.arguments import check_at_least, check_types

GateNorm = Literal["none", "layer"]


class GatedFFN(nn.Module):
    """``y = (silu(norm(g) W_g) * (x W_u)) W_d``, without biases: SwiGLU where the gate's input g is x.

    With token embeddings for g it is the dense limit of DSC: a gate that does not depend on x weighs rank-1 maps of x,
    and none is left out. All of its 3 d h parameters are active.

    Args:
        in_features: d.
        hidden_features: Width h.
        gate_norm: Normalisation of g: "layer" (LayerNorm without parameters) or "none".
        device: Where the parameters live.
        dtype: Their dtype.

    Raises:
        TypeError: If a size is no int.
        ValueError: If a size is below 1, or ``gate_norm`` unknown.
    """

    # Tells a model around the layer that forward takes ``token_mask`` and ``router_input``.
    takes_router_input = True

    def __init__(
        self,
        in_features: int,
        hidden_features: int,
        *,
        gate_norm: GateNorm = "none",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_types(GatedFFN.__init__, locals())
        check_at_least(1, in_features=in_features, hidden_features=hidden_features)
        self.norm = nn.Identity() if gate_norm == "none" else nn.LayerNorm(in_features, elementwise_affine=False)
        self.gate = nn.Linear(in_features, hidden_features, bias=False, device=device, dtype=dtype)
        self.up = nn.Linear(in_features, hidden_features, bias=False, device=device, dtype=dtype)
        self.down = nn.Linear(hidden_features, in_features, bias=False, device=device, dtype=dtype)

    def forward(self, x: Tensor, token_mask: Tensor | None = None, router_input: Tensor | None = None) -> Tensor:
        """Map tokens of shape (..., d) to (..., d).

        Args:
            x: Tokens, in the dtype of the parameters (any under autocast).
            token_mask: Ignored, as no token changes what becomes of another.
            router_input: The gate's input g instead of ``x``, of the same shape.

        Raises:
            ValueError: If ``router_input`` has another shape than ``x``.
        """
        seen = x if router_input is None else router_input
        if seen.shape != x.shape:
            raise ValueError(f"router_input must have the shape of x, {tuple(x.shape)}, got {tuple(seen.shape)}")
        y: Tensor = self.down(functional.silu(self.gate(self.norm(seen))) * self.up(x))
        return y
