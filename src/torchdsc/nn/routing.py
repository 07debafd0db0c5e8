"""What a router decides for tokens, as a value."""

from typing import NamedTuple, Self

from torch import Tensor

from .statistics_log import RoutingStatistics


class Routing(NamedTuple):
    """What a layer selects for each token: made by ``layer.route(...)``, used by ``layer(x, routing=...)``.

    Attributes:
        indices: Selected atoms I(x) or experts, int64 of shape (..., K), by falling logit (of each head).
        coefficients: Their coefficients z, equation (5), or weights, of shape (..., K).
        strength: Signal strength S, or the sum of the softmax weights, of shape (...). Not needed to compose.
        logits: Raw logits of the selected, of shape (..., K); None where the router keeps weights alone. Likewise.
        statistics: Of all tokens together, for the regularisers; None outside training or without weights.
        leaves_statistics: Whether a layer that is given this leaves the statistics for collection.
    """

    indices: Tensor
    coefficients: Tensor
    strength: Tensor | None = None
    logits: Tensor | None = None
    statistics: RoutingStatistics | None = None
    leaves_statistics: bool = True

    def take_statistics(self) -> tuple[Self, RoutingStatistics | None]:
        """The same without statistics, and these: a model that checkpoints its blocks hands them out by itself.

        What they belong to is then regularised by :meth:`RoutedLayer.leave_statistics`, or
        :func:`torchdsc.losses.regularization_of`.
        """
        return self._replace(statistics=None, leaves_statistics=False), self.statistics

    def reshape(self, *shape: int) -> Self:
        """The same of tokens of another leading shape."""
        logits = None if self.logits is None else self.logits.reshape(*shape, self.logits.shape[-1])
        strength = None if self.strength is None else self.strength.reshape(shape)
        indices, coefficients = (each.reshape(*shape, each.shape[-1]) for each in (self.indices, self.coefficients))
        return self._replace(indices=indices, coefficients=coefficients, strength=strength, logits=logits)
