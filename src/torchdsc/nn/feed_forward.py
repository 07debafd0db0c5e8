"""The recommended feed-forward layer: a static layer, DSC, and their short convolutions over token embeddings."""

from typing import Unpack, overload

import torch
from torch import Tensor, nn
from torch.nn import functional

from torchdsc.arguments import check_at_least, check_types

from .bank import BasisBank
from .context import ID_FEATURES, Contextual, Seen, with_ids
from .context_options import FeedForwardArguments, split_context
from .dsc import DSC
from .gated import GatedFFN
from .recommended import recommended
from .residual import build_static
from .routers import set_salt
from .statistics import check_token_mask


class DSCFeedForward(nn.Module, Contextual):
    """``y = base(x') + dsc(x')`` with ``x' = x + sum_i b_i * e_{t-i}``, routed by ``sum_i a_i * e_{t-i}``.

    e are the normalised token embeddings. A short convolution over those of the last four tokens is added to the
    layer's input; one over the last three is the router's input. These are the recommended settings, which are the
    defaults; others make any feed-forward layer with DSC.

    Example::

        embed, layer = nn.Embedding(50304, 384), DSCFeedForward(384, 281, num_atoms=1551)
        y = layer(x, embed(tokens))  # in training: add torchdsc.regularization(model).total to the loss

        state = layer.initial_state(batch_size)  # cached decoding
        y, state = layer(x, embed(tokens), state=state)

    With ``router="ngram"`` atoms are selected by the last tokens themselves, and forward also gets ``tokens``. The
    convolution over the last three embeddings is then left out, unless it is the input of the gate of a static layer::

        layer = DSCFeedForward(384, 200, num_atoms=1551, router="ngram", static="gated", salt=layer_index)
        y = layer(x, embed(tokens), tokens=tokens)

    Args:
        features: d.
        hidden_features: Width of the static layer, a :class:`DenseFFN`, or with ``static="gated"`` a
            :class:`GatedFFN`; 0 for none.
        base: A static layer of your own, from (..., d) to (..., d), instead of one of these.
        salt: Of the n-gram router: another one selects other atoms for the same tokens. Each layer of a model should
            have its own, for example its index. Like the options it is not saved with the weights.
        bank: A bank to share with another layer; by default a new one.
        normalize_embeddings: Whether to put embeddings through a LayerNorm without parameters. Pass False if they are
            normalised already, for example once for all layers.
        device: Where new parameters live.
        dtype: Their dtype.
        **options: Fields of :class:`torchdsc.DSCOptions` and :class:`torchdsc.nn.ContextOptions` that override the
            recommended ones, see :func:`recommended`; ``num_atoms`` is required.

    Attributes:
        base: The static layer, or None.
        dsc: The :class:`DSC`.

    Raises:
        TypeError: If an argument has another type, or an option is unknown or missing.
        ValueError: On an option out of its range, or if both ``hidden_features`` and ``base`` are given, or
            ``static="gated"`` and a ``base`` that has no gate.
    """

    def __init__(
        self,
        features: int,
        hidden_features: int = 0,
        *,
        base: nn.Module | None = None,
        salt: int = 0,
        bank: BasisBank | None = None,
        normalize_embeddings: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Unpack[FeedForwardArguments],
    ) -> None:
        super().__init__()
        check_types(DSCFeedForward.__init__, locals())
        check_at_least(1, features=features)
        check_at_least(0, hidden_features=hidden_features)
        if base is not None and hidden_features:
            raise ValueError(f"hidden_features must be 0 where base is given, got {hidden_features}")
        context, own = split_context(recommended(**options))
        if base is not None and context.static == "gated" and not isinstance(base, GatedFFN):
            raise ValueError(f"base must be a GatedFFN for static = 'gated', got a {type(base).__name__}")
        if hidden_features:
            base = build_static(context.static, features, hidden_features, device, dtype)
        # A gate sees what the router would, as in Residual.
        self.has_gate = isinstance(base, GatedFFN)
        self.features, self.normalize_embeddings = features, normalize_embeddings
        self.base = base
        self.dsc = DSC(features, bank=bank, device=device, dtype=dtype, **own)
        set_salt(self.dsc.router, salt)
        self.add_contexts(features, context.beside(gate=self.has_gate), device, dtype)

    def initial_state(self, *shape: int) -> Tensor:
        """The state for cached decoding before the first token: zeros of shape (..., past, d) for a batch (...).

        A state holds what the layer looks back to: the normalised embeddings of the last ``past`` tokens. With
        ``router="ngram"`` it has shape (..., past, d + 4), and the last four numbers are the bytes of a token's id + 1.
        """
        like = self.dsc.gamma
        return torch.zeros(*shape, *self._state_shape, device=like.device, dtype=like.dtype)

    @property
    def _state_shape(self) -> tuple[int, int]:
        return self.context.past_tokens, self.features + ID_FEATURES * self.context.hashes_ngrams

    @overload
    def forward(
        self,
        x: Tensor,
        embeddings: Tensor | None = None,
        token_mask: Tensor | None = None,
        *,
        tokens: Tensor | None = None,
        positions: Tensor | None = None,
    ) -> Tensor: ...

    @overload
    def forward(
        self,
        x: Tensor,
        embeddings: Tensor | None = None,
        token_mask: Tensor | None = None,
        *,
        tokens: Tensor | None = None,
        positions: Tensor | None = None,
        state: Tensor,
    ) -> tuple[Tensor, Tensor]: ...

    def forward(
        self,
        x: Tensor,
        embeddings: Tensor | None = None,
        token_mask: Tensor | None = None,
        *,
        tokens: Tensor | None = None,
        positions: Tensor | None = None,
        state: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Map hidden states of sequences.

        Args:
            x: Shape (..., T, d), in the dtype of the parameters (any under autocast).
            embeddings: Token embeddings without positions, of the shape of ``x``. Not needed if the options use none.
            token_mask: Optional padding mask of shape (..., T), False for padding: the short convolutions take padding
                as zeros, n-grams take it as no token, and it does not count in the regularisers.
            tokens: Token ids, int64 of shape (..., T), in [0, 2^32 - 1). Needed with ``router="ngram"`` alone.
            positions: Positions of the tokens in their sequences, counted from 0, integers that broadcast to (..., T).
                With several sequences packed in a row, short convolutions and n-grams stay within each.
            state: The state after the tokens before these, from :meth:`initial_state` or the last call.

        Returns:
            Tensor of shape (..., T, d) and the dtype of ``x``; with ``state``, a pair of it and the next state.

        Raises:
            ValueError: If a shape differs from the above, or ``embeddings`` or ``tokens`` are missing.
            TypeError: If the dtype of ``x`` is not that of the parameters, that of ``embeddings`` is not that of ``x``,
                or that of ``tokens`` is not int64.
            RuntimeError: In the backward pass, if the regularisers have not been collected by then.
        """
        sequences = self._look(x, embeddings, token_mask, tokens, state)
        seen = Seen.of(sequences, x.shape[-2], positions, self.context.orders_seen)
        routed = self.router_sees(seen)
        mixed = self.layer_sees(x, seen)
        y: Tensor = self.dsc(mixed, token_mask, routed if seen.codes is None else seen.codes)
        if self.base is not None:
            y = (self.base(mixed, router_input=routed) if self.has_gate else self.base(mixed)) + y
        # Under autocast the parts may have another dtype.
        y = y.to(x.dtype)
        if state is None:
            return y
        past = self.context.past_tokens
        # A copy, so that the state does not keep all sequences in memory.
        return y, sequences.narrow(-2, sequences.shape[-2] - past, past).clone()

    def _look(
        self,
        x: Tensor,
        embeddings: Tensor | None,
        token_mask: Tensor | None,
        tokens: Tensor | None,
        state: Tensor | None,
    ) -> Tensor:
        """What is seen of the tokens, after those of the state: (..., past + T, d), with ids beside it for n-grams."""
        if x.dim() < 2 or x.shape[-1] != self.features:
            raise ValueError(f"x must have shape (..., T, features = {self.features}), got {tuple(x.shape)}")
        check_token_mask(token_mask, x)
        source = x
        if self.context.embeddings_are_seen:
            if embeddings is None or embeddings.shape != x.shape:
                got = None if embeddings is None else tuple(embeddings.shape)
                raise ValueError(f"embeddings must have the shape of x, {tuple(x.shape)}, got {got}")
            if embeddings.dtype != x.dtype and not torch.is_autocast_enabled(x.device.type):
                raise TypeError(f"embeddings must have the dtype of x, {x.dtype}, got {embeddings.dtype}")
            source = embeddings
            if self.normalize_embeddings:
                source = functional.layer_norm(source, (self.features,))
        if self.context.hashes_ngrams:
            if tokens is None or tokens.shape != x.shape[:-1]:
                got = None if tokens is None else tuple(tokens.shape)
                raise ValueError(f"tokens must have shape {tuple(x.shape[:-1])} for router = 'ngram', got {got}")
            if tokens.dtype != torch.int64:
                raise TypeError(f"tokens must be int64, got {tokens.dtype}")
            source = with_ids(source, tokens)
        if token_mask is not None and self.context.past_tokens > 0:
            # Not a product: embeddings of padding may be NaN.
            source = source.masked_fill(~token_mask.bool().unsqueeze(-1), 0.0)
        if state is not None:
            expected = (*x.shape[:-2], *self._state_shape)
            if state.shape != expected:
                raise ValueError(f"state must have shape {expected}, got {tuple(state.shape)}")
            source = torch.cat((state.to(source.dtype), source), dim=-2)
        return source
