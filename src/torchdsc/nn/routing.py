"""The decision of a router for some tokens, as a value."""

from typing import NamedTuple, Self

from torch import Tensor

from .statistics_log import RoutingStatistics


class Routing(NamedTuple):
    """The selected atoms or experts of each token, from ``layer.route(...)`` and for ``layer(x, routing=...)``.

    Attributes:
        indices: Selected atoms I(x) or experts, int64 of shape (..., K), in descending order of logits (per head), or
            of what the router selects by, where it has a bias for that.
        coefficients: Their coefficients z, equation (5), or expert weights, of shape (..., K).
        strength: Signal strength S, or the sum of the softmax weights, of shape (...). Composition does not need it.
        logits: Raw logits of the selected, of shape (..., K); None for routers that only keep weights. Composition does
            not need them.
        statistics: Sums over all tokens for the regularisers; None outside training or if no regulariser needs them.
        leaves_statistics: Whether a layer called with this routing keeps the statistics for collection.
    """

    indices: Tensor
    coefficients: Tensor
    strength: Tensor | None = None
    logits: Tensor | None = None
    statistics: RoutingStatistics | None = None
    leaves_statistics: bool = True

    def take_statistics(self) -> tuple[Self, RoutingStatistics | None]:
        """Split off the statistics, for a model that returns them from its checkpointed blocks.

        Returns:
            This routing without statistics, and the statistics. Hand these to
            :meth:`torchdsc.nn.RoutedLayer.leave_statistics` or :func:`torchdsc.losses.regularization_of`.
        """
        return self._replace(statistics=None, leaves_statistics=False), self.statistics

    def reshape(self, *shape: int) -> Self:
        """The same routing with another leading shape."""
        logits = None if self.logits is None else self.logits.reshape(*shape, self.logits.shape[-1])
        strength = None if self.strength is None else self.strength.reshape(shape)
        indices, coefficients = (each.reshape(*shape, each.shape[-1]) for each in (self.indices, self.coefficients))
        return self._replace(indices=indices, coefficients=coefficients, strength=strength, logits=logits)
