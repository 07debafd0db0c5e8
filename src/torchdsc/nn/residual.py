"""A base module with an update beside it: ``base(x) + dsc(x)``, equation (1)."""

from typing import Any

from torch import Tensor, nn

from .routing import Routing
from .statistics import RoutedLayer


class Residual(nn.Module):
    """``y = base(x) + dsc(x)``, equation (1): the paper's feed-forward layer is ``Residual(MLP, DSC)``.

    Args:
        base: Any module from (..., d_in) to (..., d_out); its first positional argument is what ``dsc`` sees too.
        dsc: The update: a :class:`DSC`, or another routed layer of the same shape.
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
        """Tokens of shape (..., d_in) to (..., d_out), see :class:`RoutedLayer`; other arguments go to the base."""
        y: Tensor = self.base(x, *args, **kwargs)
        update: Tensor = self.dsc(x, token_mask, router_input, routing=routing)
        return y + update
