"""DSCGPT in Hugging Face form."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils import can_return_tuple

from torchdsc.losses import Regularization, regularization_of
from torchdsc.nn import DSC, RoutedLayer, RoutingStatistics
from torchdsc.nn.host import refer

from .block import DSCGPTBlock, Statistics
from .configuration import DSCGPTConfig
from .initialization import initialize

# What outputs call the key-value cache: transformers 5.24 has renamed it, and the argument too, for every model.
_CACHE = "cache" if "cache" in BaseModelOutputWithPast.__dataclass_fields__ else "past_key_values"


@dataclass
class DSCGPTModelOutput(BaseModelOutputWithPast):
    """Hidden states, cache, and in training the routing statistics of each routed layer."""

    routing_statistics: Statistics | None = None


@dataclass
class DSCGPTOutput(CausalLMOutputWithPast):
    """A causal LM's output; ``loss`` is ``task_loss`` and in training the weighted regularisers.

    ``regularization`` holds their detached values by name.
    """

    task_loss: Tensor | None = None
    regularization: dict[str, Tensor] | None = None


class DSCGPTPreTrainedModel(PreTrainedModel):
    """What the Hugging Face machinery needs to know of DSCGPT."""

    config_class = DSCGPTConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["DSCGPTBlock"]  # noqa: RUF012 (a contract of transformers)
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _supports_sdpa = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        initialize(module, self.config)


class DSCGPTModel(DSCGPTPreTrainedModel):
    """Embeddings, blocks and final norm."""

    def __init__(self, config: DSCGPTConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.embed_positions = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(DSCGPTBlock(config, i) for i in range(config.num_hidden_layers))
        self.final_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self._share_banks()
        self.gradient_checkpointing = False
        self.post_init()

    def _share_banks(self) -> None:
        """Let updates of attention refer to their block's bank, and where that is shared all to the first one's."""
        blocks = [block for block in cast(Iterable[DSCGPTBlock], self.blocks) if isinstance(block.routed_layer, DSC)]
        for index, block in enumerate(blocks):
            layer = cast(DSC, block.routed_layer)
            if self.config.model_options.share_bank and index > 0:
                refer(layer, "bank", cast(DSC, blocks[0].routed_layer).bank)
            if block.attention.update is not None:
                refer(block.attention.update, "bank", layer.bank)

    def get_input_embeddings(self) -> nn.Module:
        """The token embedding."""
        return self.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the token embedding."""
        self.embed_tokens = value  # type: ignore[assignment]

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | dict[str, Tensor | None] | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        **kwargs: Any,
    ) -> DSCGPTModelOutput:
        """Tokens (B, T) to hidden states (B, T, d).

        Args:
            input_ids: Tokens of shape (B, T).
            attention_mask: Shape (B, past + T); 0 is padding, which does not count in the regularisers either, nor as
                context of a layer or router. Or masks of transformers by name, as generation makes them.
            position_ids: Shape (B, T) or (1, T); counted from the cache by default.
            past_key_values: Key-value cache.
            inputs_embeds: Embeddings of shape (B, T, d) in place of ``input_ids``.
            use_cache: Whether to return a cache.
            output_hidden_states: Whether to return the hidden states before each block and after the last.
            **kwargs: ``cache``, another name of ``past_key_values``; others are passed on to the attention function.

        Raises:
            ValueError: If not exactly one of ``input_ids`` and ``inputs_embeds`` is given, or a sequence is longer
                than the positions.
        """
        past_key_values = kwargs.pop("cache", past_key_values)
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("exactly one of input_ids and inputs_embeds must be given")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        use_cache = not self.training and (self.config.use_cache if use_cache is None else use_cache)
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        # Those that are given may tell sequences packed in one apart.
        given_positions = position_ids
        position_ids = self._positions(inputs_embeds, position_ids, past_key_values)
        causal_mask, token_mask = self._masks(inputs_embeds, attention_mask, past_key_values, position_ids)
        hidden_states = self.dropout(inputs_embeds + self.embed_positions(position_ids))
        embeddings = None
        if self.config.model_options.embeddings_are_seen:
            size, eps = self.config.hidden_size, self.config.layer_norm_eps
            embeddings = functional.layer_norm(inputs_embeds, (size,), eps=eps)
        collected: list[RoutingStatistics | None] = []
        all_hidden = [hidden_states]
        for block in self.blocks:
            hidden_states, statistics = block(
                hidden_states,
                embeddings,
                attention_mask=causal_mask,
                token_mask=token_mask,
                past_key_values=past_key_values,
                positions=given_positions,
                **kwargs,
            )
            collected += statistics
            all_hidden.append(hidden_states)
        hidden_states = self.final_norm(hidden_states)
        return DSCGPTModelOutput(
            last_hidden_state=hidden_states,
            **{_CACHE: past_key_values if use_cache else None},
            hidden_states=(*all_hidden[:-1], hidden_states) if output_hidden_states else None,
            routing_statistics=tuple(collected) if self.training else None,
        )

    def _masks(
        self,
        inputs_embeds: Tensor,
        attention_mask: Tensor | dict[str, Tensor | None] | None,
        cache: Cache | None,
        position_ids: Tensor,
    ) -> tuple[Tensor | None, Tensor | None]:
        """What attention is masked with, and which of the T tokens are no padding, None where nothing says it."""
        if isinstance(attention_mask, dict):
            # Generation with a static cache makes them beforehand, by name where there are several.
            tokens = attention_mask.get("linear_attention")
            return attention_mask["full_attention"], None if tokens is None else tokens.bool()
        # By position: transformers 5.24 has renamed the cache.
        causal_mask: Tensor | None = create_causal_mask(
            self.config, inputs_embeds, attention_mask, cache, position_ids=position_ids
        )
        length = inputs_embeds.shape[1]
        if attention_mask is None or attention_mask.dim() != 2 or attention_mask.shape[1] < length:
            return causal_mask, None
        return causal_mask, attention_mask[:, attention_mask.shape[1] - length :].bool()

    def _positions(self, inputs_embeds: Tensor, position_ids: Tensor | None, cache: Cache | None) -> Tensor:
        """Those given, or counted from the cache; refused where the sequence is longer than there are any."""
        length, most = inputs_embeds.shape[1], self.config.max_position_embeddings
        seen = cache.get_seq_length() if cache is not None else 0
        if isinstance(seen, int) and seen + length > most:
            raise ValueError(
                f"a sequence must have at most max_position_embeddings = {most} tokens, got {seen + length}"
            )
        if position_ids is not None:
            return position_ids
        return (torch.arange(length, device=inputs_embeds.device) + seen).unsqueeze(0)


class DSCGPTForCausalLM(DSCGPTPreTrainedModel, GenerationMixin):
    """DSCGPT with a language-modelling head; in training its loss includes the regularisers.

    Exact under transformers' Trainer: with ``num_items_in_batch`` their terms are sums over routed tokens divided by
    it, and L_frame's share is that of the labelled tokens. Routed and labelled tokens differ where labels are masked:
    the terms then weigh by routed over labelled tokens.
    """

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012 (a contract of transformers)

    def __init__(self, config: DSCGPTConfig) -> None:
        super().__init__(config)
        self.model = DSCGPTModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        """The head."""
        return self.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Replace the head."""
        self.lm_head = new_embeddings  # type: ignore[assignment]

    @property
    def _routed_layers(self) -> list[RoutedLayer]:
        return [layer for block in cast(Iterable[DSCGPTBlock], self.model.blocks) for layer in block.routed_layers]

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | dict[str, Tensor | None] | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> DSCGPTOutput:
        """Logits (B, T, V), and with labels the loss.

        Args:
            input_ids: See :meth:`DSCGPTModel.forward`, as for the next four.
            attention_mask: See there.
            position_ids: See there.
            past_key_values: See there.
            inputs_embeds: See there.
            labels: Shape (B, T), shifted inside; -100 does not count.
            use_cache: See :meth:`DSCGPTModel.forward`.
            output_hidden_states: See :meth:`DSCGPTModel.forward`.
            logits_to_keep: Positions, from the end, whose logits are computed; 0 for all.
            num_items_in_batch: Labelled tokens of the whole optimizer step, as Trainer passes them.
            **kwargs: ``shift_labels`` of shape (B, T), shifted already, the token that follows each position: used
                before ``labels``. Others are those of :meth:`DSCGPTModel.forward`.

        Raises:
            ValueError: If ``num_items_in_batch`` comes without labels: something took them out of the model (label
                smoothing, a loss function of Trainer), and the regularisers would vanish.
        """
        # Trainer takes every parameter with "label" in its name for one that evaluation needs.
        shift_labels: Tensor | None = kwargs.pop("shift_labels", None)
        has_labels = labels is not None or shift_labels is not None
        if self.training and num_items_in_batch is not None and not has_labels and any(self._routed_layers):
            raise ValueError(
                "labels must reach the model in training, got num_items_in_batch without them: label smoothing and "
                "compute_loss_func of Trainer take them out, and the regularisers with them"
            )
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            return_dict=True,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        collected = [
            (layer, statistics)
            for layer, statistics in zip(self._routed_layers, outputs.routing_statistics or (), strict=False)
            if statistics is not None
        ]
        losses: dict[str, Any] = {}
        if has_labels:
            losses = self._losses(logits, labels, shift_labels, collected, num_items_in_batch)
        else:
            for layer, statistics in collected:
                layer.statistics_log.add(statistics)
        return DSCGPTOutput(
            logits=logits, hidden_states=outputs.hidden_states, **{_CACHE: getattr(outputs, _CACHE)}, **losses
        )

    def _losses(
        self,
        logits: Tensor,
        labels: Tensor | None,
        shift_labels: Tensor | None,
        collected: list[tuple[RoutedLayer, RoutingStatistics]],
        num_items_in_batch: Tensor | int | None,
    ) -> dict[str, Any]:
        """The output's loss, its task's part, and in training the regularisers."""
        task_loss = self.loss_function(
            logits=logits,
            labels=labels,
            vocab_size=self.config.vocab_size,
            num_items_in_batch=num_items_in_batch,
            shift_labels=shift_labels,
        )
        losses = {"loss": task_loss, "task_loss": task_loss.detach()}
        if self.training:
            targets = shift_labels if shift_labels is not None else labels[:, 1:]  # type: ignore[index]
            terms = self._regularization(collected, targets, num_items_in_batch)
            if terms is not None:
                losses["loss"] = task_loss + terms.total
                losses["regularization"] = {name: getattr(terms, name) for name in ("aux", "budget", "frame", "z")}
        return losses

    def _regularization(
        self,
        collected: list[tuple[RoutedLayer, RoutingStatistics]],
        targets: Tensor,
        num_items_in_batch: Tensor | int | None,
    ) -> Regularization | None:
        layers = self._routed_layers
        if not any(layer.regularizers.any for layer in layers):
            return None
        if num_items_in_batch is None:
            return regularization_of(collected, frame_layers=layers)
        precise = torch.promote_types(self.lm_head.weight.dtype, torch.float32)
        share = (targets != -100).sum(dtype=precise) / num_items_in_batch
        return regularization_of(collected, num_tokens=num_items_in_batch, frame_share=share, frame_layers=layers)
