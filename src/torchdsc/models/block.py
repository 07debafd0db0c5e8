"""A block of DSCGPT."""

from typing import Any

from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer

from torchdsc.nn import DSC, CausalContext, RoutedLayer, RoutingStatistics

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
        context = config.model_options.router_context
        self.context = CausalContext(config.hidden_size, context) if context > 1 else None
        self.layer_idx = layer_idx
        if isinstance(self.routed_layer, DSC):
            bank = self.routed_layer.bank
            self.attention.update = build_attention_update(config.feed_forward, config.feed_forward_options, bank)
        self.dropout = nn.Dropout(config.dropout)
        mark_residual_writers(self)

    @property
    def routed_layer(self) -> RoutedLayer | None:
        """The feed-forward layer that routes, if this block has one."""
        layer = getattr(self.feed_forward, "dsc", self.feed_forward)
        return layer if isinstance(layer, RoutedLayer) else None

    @property
    def routed_layers(self) -> list[RoutedLayer]:
        """All that route, in the order of :meth:`forward`."""
        return [layer for layer in (self.attention.update, self.routed_layer) if layer is not None]

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        token_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        positions: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Statistics]:
        """Hidden states (B, T, d) to (B, T, d), and the statistics of each of ``routed_layers``."""
        attended, of_attention = self.attention(
            self.attention_norm(hidden_states), attention_mask, token_mask, past_key_values, **kwargs
        )
        hidden_states = hidden_states + self.dropout(attended)
        normed, statistics = self.feed_forward_norm(hidden_states), None
        mixed = self._mixed(normed, token_mask, past_key_values, positions)
        if self.routed_layer is None:
            update = self.feed_forward(normed if mixed is None else mixed)
        else:
            update, statistics = self.feed_forward.forward_with_statistics(normed, token_mask, mixed)  # type: ignore[operator]
        found = {self.attention.update: of_attention, self.routed_layer: statistics}
        return hidden_states + self.dropout(update), tuple(found[layer] for layer in self.routed_layers)

    def _mixed(
        self, x: Tensor, token_mask: Tensor | None, cache: Cache | None, positions: Tensor | None
    ) -> Tensor | None:
        """Tokens with those before them, some of which the cache may hold; None without a context."""
        if self.context is None:
            return None
        length = x.shape[1]
        if token_mask is not None:
            # Not by a product: the state of padding need not be finite.
            x = x.masked_fill(~token_mask.unsqueeze(-1), 0.0)
        if cache is not None:
            if not hasattr(cache.layers[self.layer_idx], "update_conv_state"):
                raise ValueError(
                    "past_key_values must be made with the model's config for router_context > 1, as "
                    f"DynamicCache(config=model.config), got layers of {type(cache.layers[self.layer_idx]).__name__}"
                )
            # Features come before places there.
            kept = self.context.num_tokens - 1
            x = cache.update_conv_state(x.mT, self.layer_idx, conv_kernel_size=kept).mT
        mixed: Tensor = self.context(x, length=length, positions=positions)
        return mixed
