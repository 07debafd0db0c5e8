"""Short convolutions in front of a layer and its router, over hidden states or token embeddings."""

from collections.abc import Sequence
from typing import NamedTuple, Self

import torch
from torch import Tensor, nn

from torchdsc.ops import ngram_codes

from .context_options import ContextOptions
from .short_convolution import ShortConvolution

# An id is kept as its bytes, least first, which every floating dtype holds exactly.
ID_FEATURES = 4


class Seen(NamedTuple):
    """What the short convolutions are applied to: hidden states, or token embeddings.

    Attributes:
        sequences: Shape (..., past + T, d); padding is zeros.
        length: T, the number of tokens in this call, which come last.
        positions: Places of these T tokens in their sequences, counted from 0 whatever their position ids, see
            :meth:`ShortConvolution.forward`; None if each row is one sequence.
        codes: Of the n-grams that end at these T tokens, of shape (..., T, n), from
            :func:`torchdsc.ops.ngram_codes`; None where nothing is addressed by n-grams.
    """

    sequences: Tensor
    length: int
    positions: Tensor | None = None
    codes: Tensor | None = None

    @classmethod
    def of(cls, sequences: Tensor, length: int, positions: Tensor | None, orders: Sequence[int]) -> Self:
        """From sequences that have token ids beside them if there are ``orders`` of n-grams, see :func:`with_ids`."""
        if not orders:
            return cls(sequences, length, positions)
        features = sequences.shape[-1] - ID_FEATURES
        digits = sequences[..., features:].long()
        tokens = sum((digits[..., i] << 8 * i for i in range(1, ID_FEATURES)), digits[..., 0]) - 1
        codes = ngram_codes(tokens, orders, length=length, positions=positions)
        return cls(sequences[..., :features], length, positions, codes)

    def to(self, device: torch.device, dtype: torch.dtype | None = None) -> Self:
        """The same on another device, and in another dtype."""
        positions = None if self.positions is None else self.positions.to(device)
        codes = None if self.codes is None else self.codes.to(device)
        return self._replace(sequences=self.sequences.to(device, dtype), positions=positions, codes=codes)

    def own(self) -> Tensor:
        """The tokens of this call, of shape (..., T, d)."""
        past = self.sequences.shape[-2] - self.length
        return self.sequences if past == 0 else self.sequences.narrow(-2, past, self.length)


def with_ids(sequences: Tensor, tokens: Tensor | None) -> Tensor:
    """Put token ids beside sequences, so that both are masked and kept as one; zeros mean no token.

    Args:
        sequences: Shape (..., T, d).
        tokens: Integers below 2^32 - 1 of shape (..., T), -1 for no token; None for none at all.

    Returns:
        Tensor of shape (..., T, d + 4).
    """
    if tokens is None:
        return nn.functional.pad(sequences, (0, ID_FEATURES))
    numbers = tokens.to(sequences.device, torch.int64) + 1
    digits = torch.stack([numbers >> 8 * i & 255 for i in range(ID_FEATURES)], dim=-1)
    return torch.cat([sequences, digits.to(sequences.dtype)], dim=-1)


class Contextual:
    """A module that owns the short convolutions of a routed layer.

    Attributes:
        context: Their options.
        router_context: Convolution that makes the router's input; None if the router sees each token alone.
        input_context: Convolution that is added to the layer's input; None if nothing is added.
    """

    context: ContextOptions
    router_context: ShortConvolution | None
    input_context: ShortConvolution | None

    def add_contexts(
        self,
        features: int,
        context: ContextOptions,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Build the short convolutions that ``context`` asks for, over d = ``features``."""
        assert isinstance(self, nn.Module)
        self.context = context
        self.router_context = self.input_context = None
        if context.router_context > 1:
            self.router_context = ShortConvolution(features, context.router_context, device=device, dtype=dtype)
        if context.input_context > 1:
            self.input_context = ShortConvolution(
                features, context.input_context, own=0.0, earlier=0.25, device=device, dtype=dtype
            )

    def router_sees(self, seen: Seen) -> Tensor | None:
        """The router's input of shape (..., T, d); None if it is the layer's input."""
        if self.router_context is not None:
            mixed: Tensor = self.router_context(seen.sequences, length=seen.length, positions=seen.positions)
            return mixed
        return seen.own() if self.context.router_input == "embeddings" else None

    def layer_sees(self, x: Tensor, seen: Seen) -> Tensor:
        """The layer's input: ``x`` of shape (..., T, d), plus the convolved embeddings if the options ask for them."""
        if self.input_context is None:
            return x
        mixed: Tensor = self.input_context(seen.sequences, length=seen.length, positions=seen.positions, onto=x)
        return mixed
