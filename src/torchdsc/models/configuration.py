"""Configuration of DSCGPT."""

import copy
from collections.abc import Mapping
from dataclasses import fields
from difflib import get_close_matches
from inspect import signature
from os import PathLike
from types import MappingProxyType
from typing import Any, ClassVar, Literal

from transformers import PretrainedConfig

from torchdsc.arguments import check_at_least, check_not_negative, check_positive, check_types
from torchdsc.baselines.methods import METHODS
from torchdsc.kinds import FeedForwardKind
from torchdsc.nn import DSCOptions

from .feed_forward import check_feed_forward
from .loading import AUTO_MAP, write_module
from .options import ModelOptions, split_options

ResidualInit = Literal["gpt2", "published", "none"]
# What configs of other models call the arguments.
_ELSEWHERE = {
    **dict.fromkeys(("n_embd", "d_model", "hidden_dim"), "hidden_size"),
    **dict.fromkeys(("n_layer", "n_layers", "num_layers"), "num_hidden_layers"),
    **dict.fromkeys(("n_head", "n_heads", "num_heads"), "num_attention_heads"),
    **dict.fromkeys(("n_positions", "n_ctx"), "max_position_embeddings"),
    **dict.fromkeys(("n_inner", "d_ff"), "intermediate_size"),
}


class DSCGPTConfig(PretrainedConfig):
    """A GPT of pre-norm blocks with learned positions, linear layers without bias, and a feed-forward layer of choice.

    The defaults are the paper's DSC model.

    Args:
        vocab_size: Number of tokens.
        hidden_size: d.
        num_hidden_layers: Number of blocks.
        num_attention_heads: Number of heads; must divide ``hidden_size``.
        max_position_embeddings: Length of the longest sequence.
        feed_forward: "dense", "gated", "moe", "mixture_of_loras", "peer" or "dsc".
        intermediate_size: Width of the dense or gated layer, of an MoE expert, or of the static layer beside the update
            of DSC, PEER and Mixture-of-LoRAs (0 for none).
        feed_forward_options: Arguments of the layer: :class:`torchdsc.DSC` (which requires "num_atoms" and "top_k"),
            :class:`torchdsc.baselines.StandardMoE`, :class:`torchdsc.baselines.PEER` (both "num_experts"),
            :class:`torchdsc.baselines.MixtureOfLoRAs` ("num_experts" and "rank"), or
            :class:`torchdsc.baselines.GatedFFN`. All of them also take "router_input", "router_context" and
            "input_context" of :class:`torchdsc.nn.ContextOptions`, which for a gated layer make the gate's input; a
            dense layer takes "input_context". All take "ngram_rows", the rows of the n-gram tables beside each layer
            (:class:`torchdsc.baselines.NgramTables`; 0 for none), "ngram_heads", the tables of each order, and
            "ngram_orders", the numbers of tokens that these tables and DSC's ``router="ngram"`` hash. DSC, PEER and
            Mixture-of-LoRAs take "static", the kind of the static layer: "dense" or "gated". DSC also takes
            "share_bank", true for one bank in all blocks, and "attention_rank", the rank of an additional router by
            which the same bank updates the attention's output projection. The config keeps a read-only copy; to change
            options, assign a new dictionary.
        dropout: Of embeddings, attention weights and residual branches.
        layer_norm_eps: Of every LayerNorm.
        initializer_range: Standard deviation of initial weights.
        residual_init: Which initial weights are divided by sqrt(2 num_hidden_layers): "gpt2" for all that write into
            the residual stream; "published" for the attention output and MoE experts, as in the published run; "none".
        tie_word_embeddings: Whether input and output embeddings are tied.
        use_cache: Whether generation keeps keys and values.
        **kwargs: See ``PretrainedConfig``.

    Raises:
        TypeError: If a value has another type, a feed-forward option is given outside ``feed_forward_options``, or a
            keyword that ``PretrainedConfig`` does not know is close to one of these, or another model's name for it.
            Others are kept, as in every config of transformers.
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
        _refuse_misplaced(kwargs)
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
            # A "hybrid" cache layer also keeps the last inputs of the short convolutions: embeddings once, in the first
            # block's, but hidden states in each block's.
            rest = "full_attention" if self.model_options.tokens_are_seen else "hybrid"
            kwargs["layer_types"] = ["hybrid"] + [rest] * (num_hidden_layers - 1)
        super().__init__(tie_word_embeddings=tie_word_embeddings, **kwargs)

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = "AutoConfig") -> None:
        """From now on, save with every model a file by which Auto classes load it with ``trust_remote_code=True``.

        The file only imports the classes from torchdsc, which must be installed.

        Args:
            auto_class: Ignored; the file serves all Auto classes.
        """
        cls._saves_module = True

    def save_pretrained(self, save_directory: str | PathLike[str], push_to_hub: bool = False, **kwargs: Any) -> None:
        """See ``PretrainedConfig``. The file of :meth:`register_for_auto_class` is saved too, if that was called or the
        folder that the config was loaded from had it.
        """
        if self._saves_module or getattr(self, "auto_map", None):
            self.auto_map = dict(AUTO_MAP)
            write_module(save_directory)
        super().save_pretrained(save_directory, push_to_hub, **kwargs)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """See ``PretrainedConfig``.

        With ``top_k=1``, configs of MoE and Mixture-of-LoRAs without "normalize_weights" come from an older version,
        where the weight was always 1: the option is set to True.
        """
        options = config_dict.get("feed_forward_options") or {}
        if _takes_one_expert(config_dict.get("feed_forward"), options):
            config_dict = {**config_dict, "feed_forward_options": {"normalize_weights": True, **options}}
        return super().from_dict(config_dict, **kwargs)

    @property
    def feed_forward_options(self) -> Mapping[str, Any]:
        """Options of the layers. Read-only, as a built model would not follow a change."""
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
        """The part of ``feed_forward_options`` that concerns the model around the layers, less what no layer sees."""
        options, _ = split_options(self.feed_forward, self.feed_forward_options)
        return options.beside(gate=self.intermediate_size > 0 and options.static == "gated")


def _refuse_misplaced(keywords: Mapping[str, Any]) -> None:
    """Raise a TypeError for keywords that would be kept without any effect though they were meant to have one."""
    own = {name for name, each in signature(DSCGPTConfig).parameters.items() if each.kind is not each.VAR_KEYWORD}
    options = {field.name for kind in (DSCOptions, ModelOptions) for field in fields(kind)}
    options |= {name for method in METHODS.values() for name in (*method.widths, *signature(method.layer).parameters)}
    options -= {"in_features", "out_features", "hidden_features", "options", "bank", "device", "dtype"}
    for name in (name for name in keywords if not hasattr(PretrainedConfig, name)):
        if name in options:
            raise TypeError(f"{name} must be given in feed_forward_options, got {name} = {keywords[name]!r} beside it")
        near = [_ELSEWHERE[name]] if name in _ELSEWHERE else get_close_matches(name, own, n=1, cutoff=0.8)
        if near:
            raise TypeError(f"{name} is no argument of DSCGPTConfig: did you mean {near[0]}?")


def _takes_one_expert(kind: Any, options: Mapping[str, Any]) -> bool:
    return kind in ("moe", "mixture_of_loras") and options.get("top_k") == 1
