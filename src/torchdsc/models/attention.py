"""Attention of DSCGPT."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from torchdsc.nn import DSC, RoutingStatistics

from .configuration import DSCGPTConfig


class DSCGPTAttention(nn.Module):
    """Causal self-attention by transformers' attention functions (SDPA by default), with a key-value cache.

    Attributes:
        update: A DSC layer whose output is added to that of the output projection, or None.
    """

    def __init__(self, config: DSCGPTConfig, layer_idx: int) -> None:
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.scaling = self.head_dim**-0.5
        self.is_causal = True
        self.qkv_proj = nn.Linear(config.hidden_size, 3 * config.hidden_size, bias=False)
        self.out_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.update: DSC | None = None

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None,
        token_mask: Tensor | None,
        past_key_values: Cache | None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None, RoutingStatistics | None]:
        """Map hidden states (B, T, d) to (B, T, d).

        Returns:
            Hidden states; attention weights (B, heads, T, keys), if the attention function returns them; and the
            routing statistics of the update.
        """
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        query, key, value = (t.view(shape).transpose(1, 2) for t in self.qkv_proj(hidden_states).chunk(3, dim=-1))
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        attend: Callable[..., tuple[Tensor, Tensor | None]] = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        dropout = self.config.dropout if self.training else 0.0
        output, weights = attend(
            self, query, key, value, attention_mask, dropout=dropout, scaling=self.scaling, **kwargs
        )
        output = output.reshape(hidden_states.shape)
        if self.update is None:
            return self.out_proj(output), weights, None
        routing, statistics = self.update.route(output, token_mask).take_statistics()
        return self.out_proj(output) + self.update(output, token_mask, routing=routing), weights, statistics


def eager_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """Attention written out: inputs (B, heads, T, head_dim), output (B, T, heads, head_dim)."""
    scores = query @ key.transpose(2, 3) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = nn.functional.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    dropped = nn.functional.dropout(weights, dropout, module.training)
    return (dropped @ value).transpose(1, 2).contiguous(), weights
