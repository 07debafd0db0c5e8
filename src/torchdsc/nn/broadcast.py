"""Token embeddings and ids for layers inside a model whose code does not pass them on.

A forward pre-hook of the model records the attention mask, positions and cache of a call. A hook of its input embedding
records the ids that it is called with, and the embeddings, before positions are added. Layers ask for them. In cached
generation, those of the last tokens are kept in an additional layer of transformers' cache, which is reordered,
repeated and reset with keys and values.
"""

import inspect
import math
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from torchdsc.arguments import named_arguments

from .context import Contextual, Seen, with_ids
from .packing import find_places
from .past import after_past, cache_of, keep_past, prepare_cache

_OUTSIDE = (
    "a layer that sees the tokens or their embeddings must be called by {model}, whose call tells them, got a call of "
    "the layer, or of a module around it, alone"
)
_SEVERAL = (
    "gradient checkpointing recomputes a layer that sees the tokens or their embeddings, and {count} calls of {model} "
    "wait for their backward pass: it cannot be told whose. Call backward before the next forward pass, or switch "
    "gradient checkpointing off"
)


class Broadcast:
    """Hands the embeddings of a model's current call, and codes of its n-grams, to layers inside it.

    Args:
        model: A decoder whose call gets or embeds the tokens: ``model.get_input_embeddings()`` is its embedding.

    Attributes:
        past_tokens: How many earlier tokens a layer looks back to.
        orders: Of all n-grams that a layer asks for, in the order of the codes.
    """

    def __init__(self, model: nn.Module) -> None:
        self.past_tokens = 0
        self.orders: tuple[int, ...] = ()
        self._num_listeners = 0
        self._name = type(model).__name__
        self._accepted = tuple(inspect.signature(model.forward).parameters)
        self._is_open = False
        self._given: dict[str, Any] = {}
        self._seen: Seen | None = None
        # What of it is kept in a cache: with ids.
        self._sequences: Tensor | None = None
        # Calls whose backward pass may still recompute a layer: kept alive by the graphs of the layers' outputs.
        self._calls: weakref.WeakSet[_Call] = weakref.WeakSet()
        self._call: _Call | None = None
        self._embedding: nn.Module = model.get_input_embeddings()  # type: ignore[operator]
        self._handles = [
            model.register_forward_pre_hook(self._begin, with_kwargs=True),
            model.register_forward_hook(self._end, with_kwargs=True, always_call=True),
            self._embedding.register_forward_hook(self._embedded, with_kwargs=True),
        ]

    def __getstate__(self) -> dict[str, Any]:
        # A copied or saved model starts without the state of a call.
        blank = dict.fromkeys(("_seen", "_sequences", "_call", "_calls"))
        return {**vars(self), **blank, "_given": {}, "_is_open": False}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._calls = weakref.WeakSet()

    def join(self) -> None:
        """Count a layer that asks for embeddings."""
        self._num_listeners += 1

    def leave(self) -> None:
        """One layer less; the last takes the hooks off the model."""
        self._num_listeners -= 1
        if self._num_listeners == 0:
            for handle in self._handles:
                handle.remove()

    def seen(self, x: Tensor, rows: Tensor | None = None) -> Seen:
        """The tokens of the current call, on the device and in the dtype of ``x``.

        Args:
            x: The layer's input of shape (..., d), with every token of the call (or of ``rows``).
            rows: Which sequences of the call ``x`` holds, int64 of shape (b,); by default all.

        Raises:
            RuntimeError: If the layer is called outside its model's call, or recomputed in a backward pass while
                several calls wait for theirs.
            ValueError: If ``x`` has another number of tokens.
        """
        found = self._seen if self._is_open or torch.compiler.is_compiling() else self._recomputed()
        if found is None:
            raise RuntimeError(_OUTSIDE.format(model=self._name))
        if rows is not None:
            positions = found.positions
            if positions is not None and positions.shape[0] > 1:
                positions = positions[rows]
            codes = None if found.codes is None else found.codes[rows]
            found = Seen(found.sequences[rows], found.length, positions, codes)
        batch, length = found.sequences.shape[0], found.length
        if math.prod(x.shape[:-1]) != batch * length:
            raise ValueError(
                f"a layer that sees the tokens or their embeddings must see every token once, got hidden states of "
                f"shape {tuple(x.shape)} for {batch} sequences of {length}"
            )
        return found.to(x.device, x.dtype)

    def keep(self, output: Tensor) -> None:
        """Keep the embeddings for recomputation in the backward pass, for as long as the graph of ``output`` lives."""
        if self._is_open and output.requires_grad and not torch.compiler.is_compiling() and self._call is not None:
            output.register_hook(self._call.use)  # type: ignore[no-untyped-call]

    def _recomputed(self) -> Seen | None:
        calls = [*self._calls]
        if len(calls) > 1:
            raise RuntimeError(_SEVERAL.format(count=len(calls), model=self._name))
        return calls[0].seen if calls else None

    def _begin(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._given = named_arguments(self._accepted, args, kwargs)
        self._is_open, self._seen = True, None
        if not torch.compiler.is_compiling():
            # Drop calls whose backward pass is over, even if their graph is still referenced.
            self._calls = weakref.WeakSet(call for call in self._calls if not call.is_used)
        embedding = model.get_input_embeddings()  # type: ignore[operator]
        if embedding is not self._embedding:
            # The embedding was resized, or wrapped by an adapter.
            self._embedding = embedding
            self._handles[-1].remove()
            self._handles[-1] = embedding.register_forward_hook(self._embedded, with_kwargs=True)
        given = self._given.get("inputs_embeds")
        if isinstance(given, Tensor):
            self._look(given)

    def _embedded(self, embedding: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
        if self._is_open and self._seen is None:
            self._look(output, next(iter((*args, *kwargs.values()))))

    def _look(self, embeddings: Tensor, tokens: Tensor | None = None) -> None:
        length, past = embeddings.shape[-2], self.past_tokens
        cache = self._given.get("past_key_values", self._given.get("cache"))
        positions = self._given.get("position_ids")
        if isinstance(positions, Tensor) and positions.dim() != 2:
            raise ValueError(
                f"position_ids must have shape (B, T) for layers that see embeddings, got {tuple(positions.shape)}"
            )
        places = None
        x = functional.layer_norm(embeddings, embeddings.shape[-1:])
        if self.orders:
            x = with_ids(x, tokens)
        if past:
            mask = _token_mask(self._given.get("attention_mask"), length, cache)
            if mask is not None:
                # Not a product: hidden states of padding may be NaN.
                x = x.masked_fill(~mask.unsqueeze(-1), 0.0)
            if isinstance(positions, Tensor) and length > 1:
                # Positions only tell where one of several packed sequences ends.
                places = find_places(positions, mask, past)
            x = after_past(x, past, cache)
        self._sequences = x
        self._seen = Seen.of(x, length, places, self.orders)
        if tokens is None:
            self._seen = self._seen._replace(codes=None)
        if not torch.compiler.is_compiling() and torch.is_grad_enabled():
            self._call = _Call(self._seen)
            self._calls.add(self._call)

    def _end(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        sequences, given = self._sequences, self._given
        self._is_open, self._seen, self._sequences, self._given, self._call = False, None, None, {}, None
        cache = given.get("past_key_values", given.get("cache"))
        if cache is None:
            cache = cache_of(output)
        if sequences is not None and cache is not None and self.past_tokens:
            keep_past(sequences, self.past_tokens, cache)


class _Call:
    """The embeddings of one call of the model, for recomputation."""

    def __init__(self, seen: Seen) -> None:
        self.seen, self.is_used = seen, False

    def use(self, gradient: Tensor) -> None:
        """The hook of a layer's output, which keeps the call alive and notes its backward pass."""
        self.is_used = True


class Listener(Contextual):
    """A layer inside a model that gets token embeddings, or codes of n-grams, from a :class:`Broadcast`.

    Attributes:
        broadcast: Where they come from; None for a layer that uses none.
    """

    broadcast: Broadcast | None = None

    def listen(self, broadcast: Broadcast) -> None:
        """Take embeddings from ``broadcast`` from now on."""
        self.broadcast = broadcast
        broadcast.join()

    def leave(self) -> None:
        """Take no more embeddings."""
        if self.broadcast is not None:
            self.broadcast.leave()
            self.broadcast = None

    def look(self, x: Tensor, rows: Tensor | None = None) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """The inputs of the layer, of its router, and of the gate of a static layer beside it.

        Args:
            x: Hidden states of shape (..., d).
            rows: See :meth:`Broadcast.seen`.

        Returns:
            Three tensors of the shape of ``x``, the second of which is codes of shape (..., n) for an n-gram router.
            Either of the last two is None if it is the layer's input.

        Raises:
            RuntimeError: See :meth:`Broadcast.seen`.
            ValueError: See there; also if an n-gram router is not told the tokens.
        """
        if self.broadcast is None:
            return x, None, None
        seen = self.broadcast.seen(x, rows)
        # Some models flatten batch and sequence.
        sequences = x.reshape(*seen.sequences.shape[:-2], seen.length, x.shape[-1])
        gate = self.router_sees(seen)
        gate = None if gate is None else gate.reshape(x.shape)
        routed = gate
        if self.context.routes_by_ngrams:
            if seen.codes is None:
                raise ValueError(
                    "input_ids must be given to a model that is routed by n-grams, got inputs_embeds alone"
                )
            places = [self.broadcast.orders.index(order) for order in self.context.ngram_orders]
            routed = torch.stack([seen.codes[..., place] for place in places], -1).reshape(*x.shape[:-1], len(places))
        return self.layer_sees(sequences, seen).reshape(x.shape), routed, gate

    def kept(self, y: Tensor) -> Tensor:
        """The output ``y``, after making sure that a checkpoint can recompute it."""
        if self.broadcast is not None:
            self.broadcast.keep(y)
        return y


def decoder_of(model: nn.Module) -> nn.Module:
    """The inner model that every forward pass calls with the tokens, for example ``model.model``."""
    prefix = getattr(model, "base_model_prefix", "")
    part = getattr(model, prefix, None) if prefix else None
    return part if isinstance(part, nn.Module) else model


def embedding_size(model: nn.Module) -> int | None:
    """d of the token embeddings of ``model``; None if its embedding has no ``embedding_dim``.

    Raises:
        ValueError: If the model has no input embedding, or an encoder beside its decoder.
    """
    decoder = decoder_of(model)
    embedding = decoder.get_input_embeddings() if hasattr(decoder, "get_input_embeddings") else None  # type: ignore[operator]
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False) or not isinstance(embedding, nn.Module):
        raise ValueError(
            "router_input and input_context must leave embeddings out, and router n-grams, for a model that is no "
            f"decoder with get_input_embeddings(), got {type(model).__name__}. In a model of your own use "
            "torchdsc.DSCFeedForward"
        )
    return getattr(embedding, "embedding_dim", None)


def broadcast_tokens(model: nn.Module, features: int | None, past_tokens: int, orders: Sequence[int] = ()) -> Broadcast:
    """Let layers of ``model`` see the tokens it is called with, and their embeddings.

    Args:
        model: A causal language model with ``get_input_embeddings()``, from transformers or with the same interface.
        features: d of the layers that see embeddings; None if none does.
        past_tokens: How many earlier tokens a layer looks back to.
        orders: Of the n-grams that layers are routed by.

    Returns:
        The source to give to :meth:`Listener.listen`; one for all layers of a model.

    Raises:
        ValueError: If the model has no input embedding, one of another size, or an encoder beside its decoder.
    """
    size = embedding_size(model)
    if None not in (size, features) and size != features:
        raise ValueError(
            f"layers that see the embeddings of the tokens must have in_features = {size}, theirs, got {features}"
        )
    prepare_cache()
    decoder = decoder_of(model)
    hooks = (getattr(hook, "__self__", None) for hook in decoder._forward_pre_hooks.values())
    found = next((owner for owner in hooks if isinstance(owner, Broadcast)), None) or Broadcast(decoder)
    found.past_tokens = max(found.past_tokens, past_tokens)
    found.orders = tuple(dict.fromkeys((*found.orders, *orders)))
    return found


def _token_mask(mask: Any, length: int, cache: Any) -> Tensor | None:
    """Padding mask (B, T) of the last ``length`` tokens, False for padding; None if ``mask`` does not tell."""
    if isinstance(mask, dict):
        mask = mask.get("full_attention", next(iter(mask.values()), None))
    if not isinstance(mask, Tensor):
        return None
    if mask.dim() == 2:
        return mask[:, -length:].bool() if mask.shape[1] >= length else None
    if mask.dim() != 4 or length == 1:
        # A generated token is no padding.
        return None
    # An attention mask of four dimensions: padding does not attend to itself.
    start = 0 if cache is None else int(cache.get_seq_length())
    own = mask[:, 0, :, start : start + length].diagonal(dim1=-2, dim2=-1)
    return own if own.dtype == torch.bool else own == 0
