"""A base module with a DSC update beside it: ``base(x) + dsc(x)``, equation (1)."""

from typing import Any

from torch import Tensor, nn

from .statistics import RoutedLayer
from .statistics_log import RoutingStatistics


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
        with_statistics: bool = False,
        **kwargs: Any,
    ) -> Tensor | tuple[Tensor, RoutingStatistics | None]:
        """Tokens of shape (..., d_in) to (..., d_out); other arguments go to the base.

        ``with_statistics`` returns the statistics too, see :meth:`forward_with_statistics`.
        """
        y: Tensor = self.base(x, *args, **kwargs)
        update: Tensor
        if with_statistics:
            update, statistics = self.dsc(x, token_mask, router_input, with_statistics=True)
            return y + update, statistics
        update = self.dsc(x, token_mask, router_input)
        return y + update

    def forward_with_statistics(
        self, x: Tensor, token_mask: Tensor | None = None, router_input: Tensor | None = None
    ) -> tuple[Tensor, RoutingStatistics | None]:
        """``forward`` without side effects, see :meth:`DSC.forward_with_statistics`."""
        found: tuple[Tensor, RoutingStatistics | None] = self(
            x, token_mask=token_mask, router_input=router_input, with_statistics=True
        )
        return found
