"""A block of DSCGPT."""

from typing import Any

from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer

from torchdsc.nn import DSC, Contextual, GatedFFN, NgramRouter, Residual, RoutedLayer, Routing, RoutingStatistics, Seen
from torchdsc.nn.routers import set_salt

from .attention import DSCGPTAttention
from .configuration import DSCGPTConfig
from .feed_forward import build_attention_update, build_feed_forward
from .initialization import mark_residual_writers


class DSCGPTBlock(GradientCheckpointingLayer, Contextual):
    """Pre-norm block. It returns its routing statistics, so that activation checkpointing keeps their gradients."""

    def __init__(self, config: DSCGPTConfig, layer_idx: int) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attention = DSCGPTAttention(config, layer_idx)
        self.feed_forward_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.feed_forward = build_feed_forward(
            config.feed_forward, config.hidden_size, config.intermediate_size, config.feed_forward_options
        )
        self.add_contexts(config.hidden_size, config.model_options)
        self.ngram_tables = config.model_options.build_tables(config.hidden_size, layer_idx)
        self.layer_idx = layer_idx
        self._static_is_gated = isinstance(self.feed_forward, Residual) and isinstance(self.feed_forward.base, GatedFFN)
        layer = self.routed_layer
        # In a tuple, as it is no submodule of its own: another module may be put around it, or in its place.
        self._built = (layer,)
        self.routes_by_ngrams = isinstance(layer, DSC) and isinstance(layer.router, NgramRouter)
        if isinstance(layer, DSC):
            set_salt(layer.router, layer_idx)
            self.attention.update = build_attention_update(
                config.feed_forward, config.hidden_size, config.feed_forward_options, layer.bank
            )
        self.dropout = nn.Dropout(config.dropout)
        mark_residual_writers(self)

    @property
    def routed_layer(self) -> RoutedLayer | None:
        """The routed feed-forward layer; None if there is none, or another module has been put around it."""
        layer = self.feed_forward.dsc if isinstance(self.feed_forward, Residual) else self.feed_forward
        return layer if isinstance(layer, RoutedLayer) else None

    @property
    def routed_layers(self) -> list[RoutedLayer]:
        """All routed layers, in the order of :meth:`forward`."""
        return [layer for layer in (self.attention.update, self.routed_layer) if layer is not None]

    def _routed(self, x: Tensor, token_mask: Tensor | None, routing: Routing, routed: Tensor | None) -> Tensor:
        """The feed-forward layer of tokens that are routed already; a gate sees what the router saw."""
        gate = {"gate_input": routed} if self._static_is_gated else {}
        y: Tensor = self.feed_forward(x, token_mask=token_mask, routing=routing, **gate)
        return y

    def _inputs(self, seen: Seen) -> dict[str, Tensor | None]:
        """What the feed-forward layer's router sees, and the gate of its static layer, where they see the same."""
        routed = self.router_sees(seen)
        if not self.routes_by_ngrams or all(module is not self._built[0] for module in self.feed_forward.modules()):
            # A layer in the place of the one that was built has a router of another kind, or codes of its own.
            return {"router_input": routed}
        return {"router_input": seen.codes, **({"gate_input": routed} if self._static_is_gated else {})}

    def route(self, seen: Seen, token_mask: Tensor | None) -> Routing | None:
        """The feed-forward layer's routing, if its router sees nothing but token embeddings; else None."""
        if self.routed_layer is None:
            return None
        if self.routes_by_ngrams:
            assert seen.codes is not None
            return self.routed_layer.route(seen.codes, token_mask)
        if self.context.router_input == "hidden":
            return None
        weight = next(self.routed_layer.router.parameters(), None)
        if weight is not None and not weight.is_meta and weight.device != seen.sequences.device:
            # Blocks may be placed on several devices, and hooks bring their inputs there only when they are called.
            seen = seen.to(weight.device)
            token_mask = None if token_mask is None else token_mask.to(weight.device)
        routed = self.router_sees(seen)
        assert routed is not None
        return self.routed_layer.route(routed, token_mask)

    def forward(
        self,
        hidden_states: Tensor,
        embeddings: Tensor | None = None,
        indices: Tensor | None = None,
        coefficients: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        places: Tensor | None = None,
        codes: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, list[RoutingStatistics | None]]:
        """Map hidden states (B, T, d) to (B, T, d).

        Args:
            hidden_states: Shape (B, T, d).
            embeddings: Token embeddings (B, past + T, d), see :class:`torchdsc.nn.Seen`; None if none are used.
            indices: From :meth:`route`, as a tensor, because activation checkpointing needs tensors; or None.
            coefficients: Likewise.
            attention_mask: For the attention function.
            token_mask: Padding mask of shape (B, T), or None.
            past_key_values: Key-value cache, or None.
            places: Of the tokens in their sequences, see :class:`torchdsc.nn.Seen`.
            codes: Of n-grams, see :class:`torchdsc.nn.Seen`.
            **kwargs: For the attention function.

        Returns:
            Hidden states, and the statistics of each of ``routed_layers`` that was routed here.
        """
        attended, _, of_attention = self.attention(
            self.attention_norm(hidden_states), attention_mask, token_mask, past_key_values, **kwargs
        )
        hidden_states = hidden_states + self.dropout(attended)
        x = self.feed_forward_norm(hidden_states)
        statistics = [] if self.attention.update is None else [of_attention]
        sequences = embeddings
        if sequences is None:
            sequences = with_past(x, self.context.past_tokens, token_mask, past_key_values, self.layer_idx)
        seen = Seen(sequences, x.shape[1], places, codes)
        remembered = None if self.ngram_tables is None else self.ngram_tables(x, codes)
        x = self.layer_sees(x, seen)
        if self.routed_layer is not None and indices is not None and coefficients is not None:
            routing = Routing(indices, coefficients, leaves_statistics=False)
            routed = self.router_sees(seen) if self._static_is_gated else None
            update = self._routed(x, token_mask, routing, routed)
        elif self.routed_layer is not None and self.training:
            routed = self.router_sees(seen)
            routing, of_layer = self.routed_layer.route(x if routed is None else routed, token_mask).take_statistics()
            statistics.append(of_layer)
            update = self._routed(x, token_mask, routing, routed)
        elif getattr(self.feed_forward, "takes_router_input", False):
            # In evaluation no layer leaves statistics. A converted or adapted one leaves its own.
            update = self.feed_forward(x, token_mask=token_mask, **self._inputs(seen))
            statistics += [] if self.routed_layer is None else [None]
        else:
            update = self.feed_forward(x)
        if remembered is not None:
            update = update + remembered
        return hidden_states + self.dropout(update), statistics


def with_past(x: Tensor, past_tokens: int, token_mask: Tensor | None, cache: Cache | None, layer_idx: int) -> Tensor:
    """``x`` (B, T, d) with zeros for padding, preceded by the last ``past_tokens`` that the cache holds."""
    if past_tokens == 0:
        return x
    if token_mask is not None:
        # Not a product: hidden states of padding may be NaN.
        x = x.masked_fill(~token_mask.unsqueeze(-1), 0.0)
    if cache is None:
        return x
    if not hasattr(cache.layers[layer_idx], "update_conv_state"):
        raise ValueError(
            "past_key_values must be made with the model's config where layers or routers have a context, as "
            f"DynamicCache(config=model.config), got layers of {type(cache.layers[layer_idx]).__name__}"
        )
    # The cache stores (B, d, T).
    seen: Tensor = cache.update_conv_state(x.mT, layer_idx, conv_kernel_size=past_tokens).mT
    return seen
