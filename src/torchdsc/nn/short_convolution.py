"""Short convolutions: causal depthwise convolutions over the last few tokens."""

import torch
from torch import Tensor, nn

from torchdsc.arguments import check_at_least, check_finite, check_types
from torchdsc.ops import short_convolution

from .sharding import whole


class ShortConvolution(nn.Module):
    """``c_t = sum_{i < w} a_i * x_{t-i}``: a causal depthwise convolution, with w d parameters.

    With its output as ``router_input`` of a routed layer, the weight composed for a token depends on the tokens before
    it. The bound on ``|dW|_2`` does not depend on the router's input.

    Args:
        features: d.
        num_tokens: w >= 2, the width: the token itself and the w - 1 before it.
        own: Initial weight of the token itself.
        earlier: Initial weight of each token before it.
        device: Where the parameters live.
        dtype: Their dtype.

    Attributes:
        weight: a, of shape (w, d); row i belongs to the token i places before.

    Raises:
        TypeError: If an argument has another type.
        ValueError: If ``features`` is below 1, ``num_tokens`` below 2 or a weight not finite.
    """

    def __init__(
        self,
        features: int,
        num_tokens: int,
        *,
        own: float = 1.0,
        earlier: float = 0.5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_types(ShortConvolution.__init__, locals())
        check_at_least(1, features=features)
        check_at_least(2, num_tokens=num_tokens)
        check_finite(own=own, earlier=earlier)
        self.num_tokens, self.own, self.earlier = num_tokens, own, earlier
        self.weight = nn.Parameter(torch.empty(num_tokens, features, device=device, dtype=dtype))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """``own`` for a token itself, ``earlier`` for each before it."""
        nn.init.constant_(self.weight, self.earlier)
        nn.init.constant_(self.weight[0], self.own)

    def forward(
        self, x: Tensor, *, length: int | None = None, positions: Tensor | None = None, onto: Tensor | None = None
    ) -> Tensor:
        """Convolve sequences, with zeros before the first token.

        Args:
            x: Sequences of shape (..., T, d). Padding must be zeros.
            length: Return only the last so many tokens, for which those before are the past; by default all.
            positions: Positions of the returned tokens in their sequences, counted from 0, integers that broadcast to
                (..., length). With several sequences packed in a row, the convolution stays within each.
            onto: A tensor of shape (..., length, d) that the result is added to; by default none.

        Returns:
            Tensor of shape (..., length, d).

        Raises:
            ValueError: If ``x``, ``positions`` or ``onto`` has another shape, or ``length`` is more than T.
        """
        if x.dim() < 2 or x.shape[-1] != self.weight.shape[1]:
            raise ValueError(f"x must have shape (..., T, {self.weight.shape[1]}), got {tuple(x.shape)}")
        tokens = x.shape[-2]
        length = tokens if length is None else length
        if not 0 <= length <= tokens:
            raise ValueError(f"length must be in [0, {tokens}], got {length}")
        places = (*x.shape[:-2], length)
        if positions is not None and not _broadcasts(positions.shape, places):
            raise ValueError(f"positions must broadcast to {places}, got shape {tuple(positions.shape)}")
        if onto is not None and onto.shape != (*places, x.shape[-1]):
            raise ValueError(f"onto must have shape {(*places, x.shape[-1])}, got {tuple(onto.shape)}")
        return short_convolution(x, whole(self.weight), length, positions, onto)

    def extra_repr(self) -> str:
        """Sizes, for ``print(model)``."""
        return f"features={self.weight.shape[1]}, num_tokens={self.num_tokens}"


def _broadcasts(shape: torch.Size, places: tuple[int, ...]) -> bool:
    """Whether ``shape`` broadcasts to ``places`` and has all of its last dimension."""
    fits = 0 < len(shape) <= len(places) and shape[-1] == places[-1]
    return fits and all(size in (1, place) for size, place in zip(shape, places[-len(shape) :], strict=True))
