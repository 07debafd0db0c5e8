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
from torchdsc.nn.context import with_ids
from torchdsc.nn.host import tied_keys
from torchdsc.nn.packing import find_places
from torchdsc.nn.statistics_log import next_number

from .attention import DSCGPTAttention
from .block import DSCGPTBlock, with_past
from .configuration import DSCGPTConfig
from .initialization import initialize
from .packing import find_positions, make_masks

logger = logging.get_logger(__name__)

# Name of the key-value cache in outputs; transformers 5.24 renamed it, and the argument of every model.
_CACHE = "cache" if "cache" in BaseModelOutputWithPast.__dataclass_fields__ else "past_key_values"


@dataclass
class DSCGPTOutput(CausalLMOutputWithPast):
    """A causal LM's output. ``loss`` is ``task_loss`` plus, in training, the weighted regularisers.

    ``regularization`` has their detached, unweighted values by name.
    """

    task_loss: Tensor | None = None
    regularization: dict[str, Tensor] | None = None


class DSCGPTPreTrainedModel(PreTrainedModel):
    """Base class: what transformers needs to know about DSCGPT."""

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
        """Load as transformers does, but only from safetensors: pickled weights are refused.

        Args:
            pretrained_model_name_or_path: Folder or hub id.
            *args: See transformers.
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
        """See transformers; shared banks are added, which stay tied even without ``tie_word_embeddings``."""
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
        # Read once here, because the checks of options do not compile.
        self.model_options = config.model_options
        self._share_banks()
        self.gradient_checkpointing = False
        self.post_init()

    def _share_banks(self) -> None:
        """Tie the banks of all blocks if they share one, and the bank of each attention update to its block's."""
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
        """Map tokens (B, T) to hidden states (B, T, d).

        Args:
            input_ids: Tokens of shape (B, T).
            attention_mask: Shape (B, past + T), 0 for padding, which regularisers and short convolutions ignore too.
                Or the dictionary of masks that transformers makes in generation.
            position_ids: Shape (B, T) or (1, T); by default counted on from the cache. A row may hold several packed
                sequences: each begins where positions do not increase, and tokens see nothing of other sequences.
            past_key_values: Key-value cache. Once it holds tokens, each row must go on with one sequence.
            inputs_embeds: Embeddings of shape (B, T, d) instead of ``input_ids``.
            use_cache: Whether to make a cache if none is given; by default as in the config, but not in training. Never
                under gradient checkpointing.
            **kwargs: ``output_hidden_states`` for the hidden states before each block and after the last,
                ``output_attentions`` for the attention weights of each block (only with eager attention), and
                ``return_dict``, all by default as in the config. ``cache`` is another name for ``past_key_values``.
                All others are passed to the attention function.

        Raises:
            ValueError: If not exactly one of ``input_ids`` and ``inputs_embeds`` is given, a position is outside
                [0, ``max_position_embeddings``) (on a GPU, or compiled, the embedding's own assertion may come first),
                or sequences are packed although the cache already holds tokens.
        """
        past_key_values = kwargs.pop("cache", past_key_values)
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("exactly one of input_ids and inputs_embeds must be given")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        use_cache = self._wants_cache(use_cache)
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        # Positions given by the caller may mark packed sequences; those counted below never do.
        given_positions = position_ids
        position_ids = find_positions(self.config, inputs_embeds, position_ids, past_key_values)
        causal_mask, token_mask = make_masks(
            self.config, inputs_embeds, attention_mask, past_key_values, given_positions
        )
        hidden_states = self.dropout(inputs_embeds + self.embed_positions(position_ids))
        past_tokens, places = self.model_options.past_tokens, None
        if given_positions is not None and past_tokens > 0 and inputs_embeds.shape[1] > 1:
            places = find_places(given_positions, token_mask, past_tokens)
        seen = self._look(inputs_embeds, input_ids, token_mask, past_key_values, places)
        blocks = cast(list[DSCGPTBlock], list(self.blocks))
        # Before the first block, so that activation checkpointing does not recompute what depends on tokens alone.
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
                places=places,
                codes=None if seen is None else seen.codes,
                **kwargs,
            )
            if routing is not None:
                statistics = [*statistics, routing.statistics]
            for layer, left in zip(block.routed_layers, statistics, strict=True):
                layer.leave_statistics(left, hidden_states)
        hidden_states = self.final_norm(hidden_states)
        return BaseModelOutputWithPast(last_hidden_state=hidden_states, **{_CACHE: past_key_values})

    def _look(
        self,
        inputs_embeds: Tensor,
        input_ids: Tensor | None,
        token_mask: Tensor | None,
        cache: Cache | None,
        places: Tensor | None,
    ) -> Seen | None:
        """Token embeddings for layers and routers, normalised once for all blocks; None if the options use none."""
        options = self.model_options
        if not options.tokens_are_seen:
            return None
        embeddings = functional.layer_norm(inputs_embeds, (self.config.hidden_size,), eps=self.config.layer_norm_eps)
        length = embeddings.shape[1]
        if options.hashes_ngrams:
            if input_ids is None:
                raise ValueError(
                    "input_ids must be given to a model that is addressed by n-grams, got inputs_embeds alone"
                )
            # The cache has one place for what came before.
            embeddings = with_ids(embeddings, input_ids)
        sequences = with_past(embeddings, options.past_tokens, token_mask, cache, 0)
        return Seen.of(sequences, length, places, options.orders_seen)

    def _wants_cache(self, use_cache: bool | None) -> bool:
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        if use_cache and self.training and self.gradient_checkpointing:
            logger.warning_once("use_cache=True does not go with gradient checkpointing: no cache is made")
            return False
        return bool(use_cache)


def tied_banks(model: nn.Module) -> dict[str, str]:
    """Names of the parameters of shared banks, see :func:`torchdsc.nn.host.tied_keys`."""
    layers = ((name, module) for name, module in model.named_modules() if isinstance(module, DSC))
    # Feed-forward layers first: their names are the ones that are saved.
    return tied_keys(sorted(layers, key=lambda layer: layer[0].endswith("attention.update")))


class DSCGPTForCausalLM(DSCGPTPreTrainedModel, GenerationMixin):
    """DSCGPT with a language-modelling head; in training its loss includes the regularisers.

    With ``num_items_in_batch``, as Trainer passes it, the regularisers are sums over routed tokens divided by it, so
    that gradient accumulation does not change them. If some labels are masked, there are more routed than labelled
    tokens, and the regularisers weigh more by that ratio.
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
        """Compute logits (B, T, V), and with labels the loss.

        Args:
            input_ids: See :meth:`DSCGPTModel.forward`, as for the next four.
            attention_mask: See there.
            position_ids: See there.
            past_key_values: See there.
            inputs_embeds: See there.
            labels: Shape (B, T), shifted inside the model; -100 is ignored.
            use_cache: See :meth:`DSCGPTModel.forward`.
            logits_to_keep: Number of positions, from the end, or indices of those whose logits are computed; 0 for all.
            num_items_in_batch: Number of labelled tokens in the whole optimizer step, as Trainer passes it.
            **kwargs: ``shift_labels`` of shape (B, T), the token that follows each position, takes precedence over
                ``labels``. Others go to :meth:`DSCGPTModel.forward`.

        Raises:
            RuntimeError: In the backward pass, in training, if it does not start from a loss with the regularisers.
        """
        # Not a parameter: Trainer would require every one with "label" in its name for evaluation.
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
        """The output's fields ``loss`` and ``task_loss``, and in training ``regularization``."""
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
