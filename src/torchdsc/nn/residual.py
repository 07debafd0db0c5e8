"""A base module plus the update of a routed layer, equation (1)."""

from typing import Any

import torch
from torch import Tensor, nn

from .context_options import StaticKind
from .dense import DenseFFN
from .gated import GatedFFN
from .routing import Routing
from .statistics import RoutedLayer


class Residual(nn.Module):
    """``y = base(x) + dsc(x)``, equation (1): the paper's feed-forward layer is ``Residual(MLP, DSC)``.

    Args:
        base: Any module from (..., d_in) to (..., d_out), with x as its first positional argument. The gate of a
            :class:`torchdsc.nn.GatedFFN` sees what the router sees; x beside an n-gram router.
        dsc: The update: a :class:`torchdsc.DSC`, or another routed layer of the same sizes.
    """

    takes_router_input = True

    def __init__(self, base: nn.Module, dsc: RoutedLayer) -> None:
        super().__init__()
        self.base = base
        self.dsc = dsc

    def forward(
        self,
        x: Tensor,
        *args: Any,
        token_mask: Tensor | None = None,
        router_input: Tensor | None = None,
        routing: Routing | None = None,
        gate_input: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Map tokens (..., d_in) to (..., d_out).

        Args:
            x: Tokens.
            *args: For the base.
            token_mask: See :meth:`RoutedLayer.forward`, as for the next two.
            router_input: See there.
            routing: See there.
            gate_input: What the gate of a :class:`torchdsc.nn.GatedFFN` sees instead of ``router_input``, of the shape
                of ``x``.
            **kwargs: For the base.
        """
        if isinstance(self.base, GatedFFN):
            if gate_input is None and router_input is not None and router_input.is_floating_point():
                gate_input = router_input
            y: Tensor = self.base(x, token_mask, gate_input)
        else:
            y = self.base(x, *args, **kwargs)
        update: Tensor = self.dsc(x, token_mask, router_input, routing=routing)
        return y + update


def build_static(
    kind: StaticKind,
    features: int,
    width: int,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> DenseFFN | GatedFFN:
    """Build a static layer over d = ``features`` for beside a routed one, see :class:`torchdsc.nn.ContextOptions`."""
    if kind == "gated":
        return GatedFFN(features, width, gate_norm="layer", device=device, dtype=dtype)
    return DenseFFN(features, width, device=device, dtype=dtype)
