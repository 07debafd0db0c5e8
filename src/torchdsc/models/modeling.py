"""DSCGPT in Hugging Face form."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils import can_return_tuple, logging
from transformers.utils.output_capturing import capture_outputs

from torchdsc.losses.host import regularized
from torchdsc.nn import DSC, Seen
from torchdsc.nn.host import tied_keys
from torchdsc.nn.statistics_log import next_number

from .attention import DSCGPTAttention
from .block import DSCGPTBlock, with_past
from .configuration import DSCGPTConfig
from .initialization import initialize
from .packing import find_positions, make_masks

logger = logging.get_logger(__name__)

# What outputs call the key-value cache: transformers 5.24 has renamed it, and the argument too, for every model.
_CACHE = "cache" if "cache" in BaseModelOutputWithPast.__dataclass_fields__ else "past_key_values"


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
    _can_record_outputs = {"hidden_states": DSCGPTBlock, "attentions": DSCGPTAttention}  # noqa: RUF012

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = "AutoModel") -> None:
        """See :meth:`DSCGPTConfig.register_for_auto_class`."""
        DSCGPTConfig.register_for_auto_class()

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: Any, *args: Any, use_safetensors: bool | None = None, **kwargs: Any
    ) -> Any:
        """Transformers' loading, from safetensors alone: pickled weights are refused.

        Args:
            pretrained_model_name_or_path: Folder or hub id.
            *args: See transformers, as for ``kwargs``.
            use_safetensors: None or True.
            **kwargs: See transformers.

        Raises:
            ValueError: If ``use_safetensors`` is False.
            OSError: If there are no weights in safetensors, or none at all.
        """
        if use_safetensors is False:
            raise ValueError("use_safetensors must be None or True, got False: pickled weights are not read")
        return super().from_pretrained(pretrained_model_name_or_path, *args, use_safetensors=True, **kwargs)

    def get_expanded_tied_weights_keys(self, all_submodels: bool = False) -> dict[str, str]:
        """See transformers, which asks for tied embeddings alone: banks are tied whatever becomes of those."""
        return {**super().get_expanded_tied_weights_keys(all_submodels=all_submodels), **tied_banks(self)}

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
        # Made once: what checks options does not compile.
        self.model_options = config.model_options
        self._share_banks()
        self.gradient_checkpointing = False
        self.post_init()

    def _share_banks(self) -> None:
        """Tie the banks of all blocks, where they share one, and those of attention updates to their block's."""
        shares = self.model_options.share_bank
        for index, block in enumerate(cast(Iterable[DSCGPTBlock], self.blocks)):
            layer = block.routed_layer
            if not isinstance(layer, DSC):
                continue
            if index > 0 and shares:
                layer.bank = self.blocks[0].routed_layer.bank  # type: ignore[union-attr, assignment]
            if block.attention.update is not None:
                block.attention.update.bank = layer.bank
        self._tied_weights_keys = {re.escape(name): first for name, first in tied_banks(self).items()}

    def get_input_embeddings(self) -> nn.Module:
        """The token embedding."""
        return self.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the token embedding."""
        self.embed_tokens = value  # type: ignore[assignment]

    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | dict[str, Tensor | None] | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Tokens (B, T) to hidden states (B, T, d).

        Args:
            input_ids: Tokens of shape (B, T).
            attention_mask: Shape (B, past + T); 0 is padding, which does not count in the regularisers either, nor as
                context of a layer or router. Or masks of transformers by name, as generation makes them.
            position_ids: Shape (B, T) or (1, T); counted from the cache by default. A row may hold several sequences,
                packed: positions that do not go on begin another, and tokens see nothing of other sequences.
            past_key_values: Key-value cache. It goes on with one sequence a row.
            inputs_embeds: Embeddings of shape (B, T, d) in place of ``input_ids``.
            use_cache: Whether to make a cache where none is given; by default what the config says, in training none.
                Under gradient checkpointing there is none.
            **kwargs: ``output_hidden_states`` for the hidden states before each block and after the last,
                ``output_attentions`` for the attention weights of each block (of eager attention, which alone has
                them), and ``return_dict``; by default what the config says. ``cache`` is another name of
                ``past_key_values``. All others go on to the attention function.

        Raises:
            ValueError: If not exactly one of ``input_ids`` and ``inputs_embeds`` is given, a position is not in
                [0, ``max_position_embeddings``) (on an accelerator, or compiled, the embedding's own assertion may come
                first), or sequences are packed where a cache holds tokens already.
        """
        past_key_values = kwargs.pop("cache", past_key_values)
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("exactly one of input_ids and inputs_embeds must be given")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        use_cache = self._wants_cache(use_cache)
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        # Those that are given may tell sequences packed in one apart.
        given_positions = position_ids
        position_ids = find_positions(self.config, inputs_embeds, position_ids, past_key_values)
        causal_mask, token_mask = make_masks(
            self.config, inputs_embeds, attention_mask, past_key_values, given_positions
        )
        hidden_states = self.dropout(inputs_embeds + self.embed_positions(position_ids))
        seen = self._look(inputs_embeds, token_mask, past_key_values, given_positions)
        blocks = cast(list[DSCGPTBlock], list(self.blocks))
        # Before the first block: what depends on tokens alone is not computed again for a checkpoint.
        routings = [None if seen is None else block.route(seen, token_mask) for block in blocks]
        for block, routing in zip(blocks, routings, strict=True):
            hidden_states, statistics = block(
                hidden_states,
                None if seen is None else seen.sequences,
                None if routing is None else routing.indices,
                None if routing is None else routing.coefficients,
                attention_mask=causal_mask,
                token_mask=token_mask,
                past_key_values=past_key_values,
                positions=given_positions,
                **kwargs,
            )
            if routing is not None:
                statistics = [*statistics, routing.statistics]
            for layer, left in zip(block.routed_layers, statistics, strict=True):
                layer.leave_statistics(left, hidden_states)
        hidden_states = self.final_norm(hidden_states)
        return BaseModelOutputWithPast(last_hidden_state=hidden_states, **{_CACHE: past_key_values})

    def _look(
        self, inputs_embeds: Tensor, token_mask: Tensor | None, cache: Cache | None, positions: Tensor | None
    ) -> Seen | None:
        """The embeddings that layers and routers see, normalised once for all blocks; None where they see none."""
        options = self.model_options
        if not options.embeddings_are_seen:
            return None
        embeddings = functional.layer_norm(inputs_embeds, (self.config.hidden_size,), eps=self.config.layer_norm_eps)
        sequences = with_past(embeddings, options.past_tokens, token_mask, cache, 0)
        return Seen(sequences, inputs_embeds.shape[1], positions)

    def _wants_cache(self, use_cache: bool | None) -> bool:
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        if use_cache and self.training and self.gradient_checkpointing:
            logger.warning_once("use_cache=True does not go with gradient checkpointing: no cache is made")
            return False
        return bool(use_cache)


def tied_banks(model: nn.Module) -> dict[str, str]:
    """Parameters of banks that several layers of a DSCGPT have, see :func:`torchdsc.nn.host.tied_keys`."""
    layers = ((name, module) for name, module in model.named_modules() if isinstance(module, DSC))
    # A bank is named after the feed-forward layer that has it.
    return tied_keys(sorted(layers, key=lambda layer: layer[0].endswith("attention.update")))


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
            logits_to_keep: Positions, from the end, whose logits are computed; 0 for all.
            num_items_in_batch: Labelled tokens of the whole optimizer step, as Trainer passes them.
            **kwargs: ``shift_labels`` of shape (B, T), shifted already, the token that follows each position: used
                before ``labels``. Others go to :meth:`DSCGPTModel.forward`.

        Raises:
            RuntimeError: In a backward pass in training whose loss does not hold the regularisers.
        """
        # Trainer takes every parameter with "label" in its name for one that evaluation needs.
        shift_labels: Tensor | None = kwargs.pop("shift_labels", None)
        since = 0 if torch.compiler.is_compiling() else next_number()
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            return_dict=True,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        losses: dict[str, Any] = {}
        if labels is not None or shift_labels is not None:
            losses = self._losses(logits, labels, shift_labels, num_items_in_batch, outputs.hidden_states, since)
        return DSCGPTOutput(
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            **{_CACHE: getattr(outputs, _CACHE)},
            **losses,
        )

    def _losses(
        self,
        logits: Tensor,
        labels: Tensor | None,
        shift_labels: Tensor | None,
        num_items_in_batch: Tensor | int | None,
        hidden_states: Any,
        since: int,
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
            outputs = (logits, hidden_states)
            found = regularized(
                self, task_loss, outputs, since=since, num_items=num_items_in_batch, num_labels=(targets != -100).sum()
            )
            if found is not None:
                losses["loss"], terms = found
                losses["regularization"] = {name: getattr(terms, name) for name in ("aux", "budget", "frame", "z")}
        return losses
