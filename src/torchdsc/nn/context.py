"""What layers and their routers see of a sequence: short convolutions of hidden states or of the tokens' embeddings."""

from typing import NamedTuple, Self

import torch
from torch import Tensor, nn

from .options import ContextOptions
from .short_convolution import ShortConvolution


class Seen(NamedTuple):
    """Sequences that contexts look at: hidden states, or the embeddings of tokens.

    Attributes:
        sequences: Shape (..., past + T, d); padding is zeros.
        length: T, the tokens of this call, which are the last.
        positions: Their places in their sequences, see :meth:`ShortConvolution.forward`; None for one sequence a row.
    """

    sequences: Tensor
    length: int
    positions: Tensor | None = None

    def to(self, device: torch.device, dtype: torch.dtype | None = None) -> Self:
        """The same on another device, and in another dtype."""
        positions = None if self.positions is None else self.positions.to(device)
        return self._replace(sequences=self.sequences.to(device, dtype), positions=positions)

    def own(self) -> Tensor:
        """The tokens of this call, of shape (..., T, d)."""
        past = self.sequences.shape[-2] - self.length
        return self.sequences if past == 0 else self.sequences.narrow(-2, past, self.length)


class Contextual:
    """A module around a routed layer that owns its short convolutions.

    Attributes:
        context: What they are.
        router_context: Of what the router sees; None for the token alone.
        input_context: Of what is added to the layer's input; None for nothing.
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
        """Build what ``context`` asks for, of d = ``features``."""
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
        """What the router sees, of shape (..., T, d); None for what the layer does."""
        if self.router_context is not None:
            mixed: Tensor = self.router_context(seen.sequences, length=seen.length, positions=seen.positions)
            return mixed
        return seen.own() if self.context.router_input == "embeddings" else None

    def layer_sees(self, x: Tensor, seen: Seen) -> Tensor:
        """What the layer sees, of the shape of its input ``x``, (..., T, d)."""
        if self.input_context is None:
            return x
        mixed: Tensor = self.input_context(seen.sequences, length=seen.length, positions=seen.positions, onto=x)
        return mixed
