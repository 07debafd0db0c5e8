"""Configuration of DSCGPT."""

import copy
from collections.abc import Mapping
from os import PathLike
from types import MappingProxyType
from typing import Any, ClassVar, Literal

from transformers import PretrainedConfig

from torchdsc.arguments import check_at_least, check_not_negative, check_positive, check_types

from .feed_forward import check_feed_forward
from .loading import AUTO_MAP, write_module
from .options import FeedForwardKind, ModelOptions, split_options

ResidualInit = Literal["gpt2", "published", "none"]


class DSCGPTConfig(PretrainedConfig):
    """A GPT of pre-norm blocks with learned positions, bias-free linears and a feed-forward layer of choice.

    The defaults are the paper's DSC model.

    Args:
        vocab_size: Tokens.
        hidden_size: d.
        num_hidden_layers: Blocks.
        num_attention_heads: Heads; must divide ``hidden_size``.
        max_position_embeddings: Longest sequence.
        feed_forward: "dense", "moe", "mixture_of_loras", "peer" or "dsc".
        intermediate_size: Width of the dense layer, of one MoE expert, or of the static layer beside the update of
            DSC, PEER and Mixture-of-LoRAs (0 leaves it out).
        feed_forward_options: Further arguments of :class:`torchdsc.DSC` ("num_atoms" and "top_k" are required;
            "share_bank": true for one bank in all blocks; "attention_rank" for an update of the attention's output
            projection from the same bank, by a router of that rank), of
            :class:`torchdsc.baselines.StandardMoE` and :class:`torchdsc.baselines.PEER` ("num_experts"), or
            :class:`torchdsc.baselines.MixtureOfLoRAs` ("num_experts" and "rank"). Any of them takes "router_input",
            "embeddings" for routers that see those of the tokens in place of what the layers do; "router_context", of
            how many tokens they see the mix (:class:`torchdsc.ShortConvolution`); and "input_context", of how many
            tokens embeddings are mixed into what a layer sees, which a dense one takes as well. The config keeps a
            copy, which is read-only: other options are assigned as a whole.
        dropout: Of embeddings, attention weights and residual branches.
        layer_norm_eps: Of every LayerNorm.
        initializer_range: Standard deviation of initial weights.
        residual_init: "gpt2" divides it by sqrt(2 layers) for all that writes into the residual stream; "published"
            for the attention output and MoE experts alone, as the published run does; "none" nowhere.
        tie_word_embeddings: Whether input and output embeddings are one.
        use_cache: Whether generation keeps keys and values.
        **kwargs: See ``PretrainedConfig``.

    Raises:
        TypeError: If a value has another type.
        ValueError: On a value out of its range, or an unknown, missing or wrong feed-forward option.
    """

    model_type = "dsc_gpt"
    _saves_module: ClassVar[bool] = False
    keys_to_ignore_at_inference = ["past_key_values", "regularization", "task_loss"]  # noqa: RUF012 (a contract of transformers)

    def __init__(
        self,
        vocab_size: int = 50304,
        hidden_size: int = 384,
        num_hidden_layers: int = 6,
        num_attention_heads: int = 6,
        max_position_embeddings: int = 256,
        feed_forward: FeedForwardKind = "dsc",
        intermediate_size: int = 327,
        feed_forward_options: dict[str, Any] | None = None,
        dropout: float = 0.1,
        layer_norm_eps: float = 1e-5,
        initializer_range: float = 0.02,
        residual_init: ResidualInit = "gpt2",
        tie_word_embeddings: bool = True,
        use_cache: bool = True,
        **kwargs: Any,
    ) -> None:
        if feed_forward_options is None:
            feed_forward_options = {"num_atoms": 1523, "top_k": 4} if feed_forward == "dsc" else {}
        check_types(DSCGPTConfig.__init__, locals())
        check_at_least(1, vocab_size=vocab_size, hidden_size=hidden_size, num_hidden_layers=num_hidden_layers)
        check_at_least(1, num_attention_heads=num_attention_heads, max_position_embeddings=max_position_embeddings)
        check_at_least(0, intermediate_size=intermediate_size)
        check_positive(layer_norm_eps=layer_norm_eps)
        check_not_negative(initializer_range=initializer_range)
        if hidden_size % num_attention_heads:
            raise ValueError(f"num_attention_heads must divide hidden_size = {hidden_size}, got {num_attention_heads}")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {dropout}")
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.max_position_embeddings = max_position_embeddings
        self.feed_forward = feed_forward
        self.intermediate_size = intermediate_size
        self.feed_forward_options = feed_forward_options
        self.dropout = dropout
        self.layer_norm_eps = layer_norm_eps
        self.initializer_range = initializer_range
        self.residual_init = residual_init
        self.use_cache = use_cache
        if self.model_options.past_tokens > 0:
            # A cache keeps the last tokens that contexts saw beside keys and values: hidden states are each block's
            # own, embeddings the same for all.
            rest = "full_attention" if self.model_options.embeddings_are_seen else "hybrid"
            kwargs["layer_types"] = ["hybrid"] + [rest] * (num_hidden_layers - 1)
        super().__init__(tie_word_embeddings=tie_word_embeddings, **kwargs)

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = "AutoConfig") -> None:
        """Save with every model from now on a file by which Auto classes find it, given ``trust_remote_code=True``.

        It imports from torchdsc, which must be installed, and holds no code of the model.

        Args:
            auto_class: The file serves all that there are.
        """
        cls._saves_module = True

    def save_pretrained(self, save_directory: str | PathLike[str], push_to_hub: bool = False, **kwargs: Any) -> None:
        """See ``PretrainedConfig``; with a file for Auto classes after :meth:`register_for_auto_class`, or where the
        folder that this was loaded from had one.
        """
        if self._saves_module or getattr(self, "auto_map", None):
            self.auto_map = dict(AUTO_MAP)
            write_module(save_directory)
        super().save_pretrained(save_directory, push_to_hub, **kwargs)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """See ``PretrainedConfig``.

        Where one expert is taken, whether its weight is normalised is saved with the model. Models saved without that
        were trained with a weight of 1, and are evaluated with it.
        """
        options = config_dict.get("feed_forward_options") or {}
        if _takes_one_expert(config_dict.get("feed_forward"), options):
            config_dict = {**config_dict, "feed_forward_options": {"normalize_weights": True, **options}}
        return super().from_dict(config_dict, **kwargs)

    @property
    def feed_forward_options(self) -> Mapping[str, Any]:
        """Options of the layers, read-only: what was built of them would not follow."""
        return MappingProxyType(self.__dict__["feed_forward_options"])

    @feed_forward_options.setter
    def feed_forward_options(self, options: Mapping[str, Any]) -> None:
        options = copy.deepcopy(dict(options))
        if _takes_one_expert(self.feed_forward, options):
            options = {"normalize_weights": False, **options}
        check_feed_forward(self.feed_forward, self.hidden_size, self.intermediate_size, options)
        self.__dict__["feed_forward_options"] = options

    @property
    def model_options(self) -> ModelOptions:
        """Those of ``feed_forward_options`` that concern the model around the layers."""
        return split_options(self.feed_forward, self.feed_forward_options)[0]


def _takes_one_expert(kind: Any, options: Mapping[str, Any]) -> bool:
    return kind in ("moe", "mixture_of_loras") and options.get("top_k") == 1
