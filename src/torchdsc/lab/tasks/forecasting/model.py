"""A patch transformer in Hugging Face form, its feed-forward layer chosen by its configuration."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PretrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.utils import ModelOutput

from torchdsc.kinds import FeedForwardKind
from torchdsc.losses.host import regularized
from torchdsc.models.feed_forward import build_feed_forward
from torchdsc.models.initialization import initialize, mark_residual_writers
from torchdsc.nn.statistics_log import next_number

from .settings import Attention, check_feed_forward_options

__all__ = ["PatchForecaster", "PatchForecasterConfig", "PatchForecasterOutput"]

# Added to the variance of a look-back, so that one that does not move can be divided by its deviation.
_EPS = 1e-5


class PatchForecasterConfig(PretrainedConfig):
    """Configuration of :class:`PatchForecaster`.

    Args:
        look_back: Rows of a window L.
        horizon: Rows of a forecast H.
        patch_length: Rows of a patch.
        stride: Rows from one patch to the next.
        hidden_size: d.
        num_hidden_layers: Number of blocks.
        num_attention_heads: Number of heads; must divide ``hidden_size``.
        attention: "full" or "causal".
        feed_forward: Kind of feed-forward layer, see :class:`torchdsc.models.DSCGPTConfig`, as for the next two.
        intermediate_size: Its width.
        feed_forward_options: Its options, but for those that need token embeddings or ids, or concern several layers.
        dropout: Of embedded patches, attention weights and residual branches.
        layer_norm_eps: Of every LayerNorm.
        initializer_range: Standard deviation of initial weights.
        residual_init: See :class:`torchdsc.models.DSCGPTConfig`.
        **kwargs: See ``PretrainedConfig``.

    Raises:
        ValueError: If a feed-forward option is refused.
    """

    model_type = "dsc_patch_forecaster"
    keys_to_ignore_at_inference = ["task_loss", "regularization"]  # noqa: RUF012 (a contract of transformers)

    def __init__(
        self,
        look_back: int = 96,
        horizon: int = 96,
        patch_length: int = 16,
        stride: int = 8,
        hidden_size: int = 32,
        num_hidden_layers: int = 3,
        num_attention_heads: int = 4,
        attention: Attention = "full",
        feed_forward: FeedForwardKind = "dense",
        intermediate_size: int = 128,
        feed_forward_options: dict[str, Any] | None = None,
        dropout: float = 0.2,
        layer_norm_eps: float = 1e-5,
        initializer_range: float = 0.02,
        residual_init: str = "gpt2",
        **kwargs: Any,
    ) -> None:
        check_feed_forward_options(feed_forward_options or {})
        self.look_back = look_back
        self.horizon = horizon
        self.patch_length = patch_length
        self.stride = stride
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.attention = attention
        self.feed_forward = feed_forward
        self.intermediate_size = intermediate_size
        self.feed_forward_options = dict(feed_forward_options or {})
        self.dropout = dropout
        self.layer_norm_eps = layer_norm_eps
        self.initializer_range = initializer_range
        self.residual_init = residual_init
        super().__init__(**kwargs)


@dataclass
class PatchForecasterOutput(ModelOutput):
    """A forecast, and its loss.

    Attributes:
        loss: ``task_loss`` plus, in training, the weighted regularisers; None without labels.
        forecast: Shape (B, H, C).
        task_loss: Mean squared error over windows, rows and columns, detached.
        regularization: The regularisers' detached, unweighted values by name; in training alone.
    """

    loss: Tensor | None = None
    forecast: Tensor | None = None
    task_loss: Tensor | None = None
    regularization: dict[str, Tensor] | None = None


class PatchAttention(nn.Module):
    """Self-attention of the patches of a column, without biases, as DSCGPT's."""

    def __init__(self, config: PatchForecasterConfig) -> None:
        super().__init__()
        self.heads, self.dropout = config.num_attention_heads, config.dropout
        self.is_causal = config.attention == "causal"
        self.qkv_proj = nn.Linear(config.hidden_size, 3 * config.hidden_size, bias=False)
        self.out_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Map hidden states (N, P, d) to (N, P, d)."""
        parts = self.qkv_proj(hidden_states).chunk(3, dim=-1)
        query, key, value = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts)
        dropout = self.dropout if self.training else 0.0
        attended = functional.scaled_dot_product_attention(
            query, key, value, dropout_p=dropout, is_causal=self.is_causal
        )
        mixed: Tensor = self.out_proj(attended.transpose(1, 2).flatten(2))
        return mixed


class PatchBlock(nn.Module):
    """Pre-norm block of attention and the feed-forward layer."""

    def __init__(self, config: PatchForecasterConfig) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attention = PatchAttention(config)
        self.feed_forward_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.feed_forward = build_feed_forward(
            config.feed_forward, config.hidden_size, config.intermediate_size, config.feed_forward_options
        )
        self.dropout = nn.Dropout(config.dropout)
        mark_residual_writers(self)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Map hidden states (N, P, d) to (N, P, d)."""
        hidden_states = hidden_states + self.dropout(self.attention(self.attention_norm(hidden_states)))
        updated: Tensor = hidden_states + self.dropout(self.feed_forward(self.feed_forward_norm(hidden_states)))
        return updated


class PatchForecaster(PreTrainedModel):
    """A channel-independent patch transformer (arXiv 2211.14730): every column is forecast by itself, by one model.

    The look-back of a column, less its mean and over its deviation, is cut into patches that overlap. They are embedded
    linearly, with learned positions, and go through the blocks; a linear head over all of them together says the
    horizon, to which mean and deviation are given back.

    Args:
        config: Its configuration.
    """

    config_class = PatchForecasterConfig
    base_model_prefix = "forecaster"
    main_input_name = "past_values"
    _supports_sdpa = True
    # Micro-batches of a step are averaged, and so are their regularisers.
    accepts_loss_kwargs = False

    def __init__(self, config: PatchForecasterConfig) -> None:
        super().__init__(config)
        patches = (config.look_back - config.patch_length) // config.stride + 1
        # No bias, as each position has its own.
        self.embed_patches = nn.Linear(config.patch_length, config.hidden_size, bias=False)
        self.embed_positions = nn.Embedding(patches, config.hidden_size)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(PatchBlock(config) for _ in range(config.num_hidden_layers))
        self.final_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.head = nn.Linear(patches * config.hidden_size, config.horizon)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        initialize(module, self.config)
        if module is self.head:
            init.zeros_(module.bias)

    def forward(self, past_values: Tensor, labels: Tensor | None = None) -> PatchForecasterOutput:
        """Forecast, and with labels compute the loss.

        Args:
            past_values: Look-backs of shape (B, L, C).
            labels: What followed, of shape (B, H, C).

        Raises:
            ValueError: If a shape is another.
            RuntimeError: In the backward pass, in training, if it does not start from a loss with the regularisers.
        """
        if past_values.dim() != 3 or past_values.shape[1] != self.config.look_back:
            raise ValueError(
                f"past_values must have shape (B, look_back = {self.config.look_back}, C), "
                f"got {tuple(past_values.shape)}"
            )
        since = 0 if torch.compiler.is_compiling() else next_number()
        forecast = self._forecast(past_values)
        if labels is None:
            return PatchForecasterOutput(forecast=forecast)
        if labels.shape != forecast.shape:
            raise ValueError(f"labels must have shape {tuple(forecast.shape)}, got {tuple(labels.shape)}")
        task_loss = functional.mse_loss(forecast.float(), labels.float())
        output = PatchForecasterOutput(loss=task_loss, forecast=forecast, task_loss=task_loss.detach())
        if self.training:
            found = regularized(self, task_loss, forecast, since=since, num_items=None, num_labels=None)
            if found is not None:
                output.loss, terms = found
                output.regularization = {name: getattr(terms, name) for name in ("aux", "budget", "frame", "z")}
        return output

    def _forecast(self, past_values: Tensor) -> Tensor:
        batch, _, columns = past_values.shape
        mean = past_values.mean(dim=1, keepdim=True)
        deviation = (past_values.var(dim=1, keepdim=True, correction=0) + _EPS).sqrt()
        # (B, C, L), and each column a row of its own.
        series = ((past_values - mean) / deviation).transpose(1, 2).flatten(0, 1)
        patches = series.unfold(-1, self.config.patch_length, self.config.stride)
        hidden_states = self.dropout(self.embed_patches(patches) + self.embed_positions.weight)
        for block in self.blocks:
            hidden_states = block(hidden_states)
        said = self.head(self.final_norm(hidden_states).flatten(1))
        forecast: Tensor = said.view(batch, columns, -1).transpose(1, 2) * deviation + mean
        return forecast
