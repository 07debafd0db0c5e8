"""A block of DSCGPT."""

from typing import Any

from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer

from torchdsc.nn import DSC, Residual, RoutedLayer, RoutingStatistics, ShortConvolution

from .attention import DSCGPTAttention
from .configuration import DSCGPTConfig
from .feed_forward import build_attention_update, build_feed_forward
from .initialization import mark_residual_writers

# Of the routed layers of a block, and of all blocks.
Statistics = tuple[RoutingStatistics | None, ...]


class DSCGPTBlock(GradientCheckpointingLayer):
    """Pre-norm block. It returns its routing statistics, so that they come through a checkpoint with their graph."""

    def __init__(self, config: DSCGPTConfig, layer_idx: int) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attention = DSCGPTAttention(config, layer_idx)
        self.feed_forward_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.feed_forward = build_feed_forward(
            config.feed_forward, config.hidden_size, config.intermediate_size, config.feed_forward_options
        )
        options = config.model_options
        self.router_input, self.past_tokens = options.router_input, options.past_tokens
        self.router_context = _context(config.hidden_size, options.router_context)
        self.input_context = _context(config.hidden_size, options.input_context, own=0.0, earlier=0.25)
        self.layer_idx = layer_idx
        if isinstance(self.routed_layer, DSC):
            bank = self.routed_layer.bank
            self.attention.update = build_attention_update(config.feed_forward, config.feed_forward_options, bank)
        self.dropout = nn.Dropout(config.dropout)
        mark_residual_writers(self)

    @property
    def routed_layer(self) -> RoutedLayer | None:
        """The feed-forward layer that routes; None without one, or where another module has been put around it."""
        layer = self.feed_forward.dsc if isinstance(self.feed_forward, Residual) else self.feed_forward
        return layer if isinstance(layer, RoutedLayer) else None

    @property
    def routed_layers(self) -> list[RoutedLayer]:
        """All that route, in the order of :meth:`forward`."""
        return [layer for layer in (self.attention.update, self.routed_layer) if layer is not None]

    def forward(
        self,
        hidden_states: Tensor,
        embeddings: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        positions: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Statistics]:
        """Hidden states (B, T, d) to (B, T, d), and the statistics of each of ``routed_layers``.

        ``embeddings``, (B, T, d), are those of the tokens where a layer or a router sees them.
        """
        attended, _, of_attention = self.attention(
            self.attention_norm(hidden_states), attention_mask, token_mask, past_key_values, **kwargs
        )
        hidden_states = hidden_states + self.dropout(attended)
        x, statistics = self.feed_forward_norm(hidden_states), None
        seen = x if embeddings is None else embeddings
        with_past = self._with_past(seen, token_mask, past_key_values)
        routed = seen if self.router_input == "embeddings" else None
        if self.router_context is not None:
            routed = self.router_context(with_past, length=x.shape[1], positions=positions)
        if self.input_context is not None:
            x = self.input_context(with_past, length=x.shape[1], positions=positions, onto=x)
        if self.routed_layer is None and not getattr(self.feed_forward, "takes_router_input", False):
            update = self.feed_forward(x)
        elif self.routed_layer is None:
            # A converted or adapted one, which leaves its statistics itself.
            update = self.feed_forward(x, token_mask=token_mask, router_input=routed)
        else:
            update, statistics = self.feed_forward.forward_with_statistics(x, token_mask, routed)  # type: ignore[operator]
        found = {self.attention.update: of_attention, self.routed_layer: statistics}
        return hidden_states + self.dropout(update), tuple(found[layer] for layer in self.routed_layers)

    def _with_past(self, x: Tensor, token_mask: Tensor | None, cache: Cache | None) -> Tensor:
        """Tokens after those before them that contexts see, of which the cache may hold some; padding is zeros."""
        if self.past_tokens == 0:
            return x
        if token_mask is not None:
            # Not by a product: the state of padding need not be finite.
            x = x.masked_fill(~token_mask.unsqueeze(-1), 0.0)
        if cache is None:
            return x
        if not hasattr(cache.layers[self.layer_idx], "update_conv_state"):
            raise ValueError(
                "past_key_values must be made with the model's config where layers or routers have a context, as "
                f"DynamicCache(config=model.config), got layers of {type(cache.layers[self.layer_idx]).__name__}"
            )
        # Features come before places there.
        seen: Tensor = cache.update_conv_state(x.mT, self.layer_idx, conv_kernel_size=self.past_tokens).mT
        return seen


def _context(features: int, num_tokens: int, own: float = 1.0, earlier: float = 0.5) -> ShortConvolution | None:
    return ShortConvolution(features, num_tokens, own=own, earlier=earlier) if num_tokens > 1 else None
