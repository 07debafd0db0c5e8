"""A base module plus the update of a routed layer, equation (1)."""

from typing import Any

from torch import Tensor, nn

from .routing import Routing
from .statistics import RoutedLayer


class Residual(nn.Module):
    """``y = base(x) + dsc(x)``, equation (1): the paper's feed-forward layer is ``Residual(MLP, DSC)``.

    Args:
        base: Any module from (..., d_in) to (..., d_out), with x as its first positional argument.
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
        **kwargs: Any,
    ) -> Tensor:
        """Map tokens (..., d_in) to (..., d_out), see :meth:`RoutedLayer.forward`; other arguments go to the base."""
        y: Tensor = self.base(x, *args, **kwargs)
        update: Tensor = self.dsc(x, token_mask, router_input, routing=routing)
        return y + update
