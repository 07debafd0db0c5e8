"""The table of feed-forward methods: how each is built, sized for a budget, counted, described and drawn."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from torchdsc.nn import DSC, DenseFFN, GatedFFN

from .mixture_of_loras import MixtureOfLoRAs
from .moe import StandardMoE
from .peer import PEER

Form = Literal["dense", "experts", "update"]
_TABLES = frozenset({"ngram_rows", "ngram_orders", "ngram_heads"})
_CONTEXT = _TABLES | {"router_input", "router_context", "input_context"}
_UPDATE = _CONTEXT | {"static"}


@dataclass(frozen=True)
class Method:
    """A feed-forward method, as models build it and comparisons show it.

    Attributes:
        label: Name in tables and figures.
        layer: Class, called as ``layer(d, width, **options)``, or as ``layer(d, **options)`` for an update.
        form: What has the width ``intermediate_size``: "dense" for the layer itself, "experts" for each of its experts,
            "update" for a static layer that the layer is added to.
        idle: Number of parameters of a built layer that are idle for any one token.
        words: Format of a short description, with fields ``width``, ``shared`` (a shared bank) and options.
        color: Colour in figures, on a light and on a dark page.
        marker: Matplotlib's marker, and the same as a character.
        widths: Options that the budget solver sets: number of units, units per token, and rank of a unit.
        units: Name of what a token selects, in the plural.
        router: Default kind of router.
        model_options: Options that concern the model around the layer: fields of
            :class:`torchdsc.models.options.ModelOptions`.
    """

    label: str
    layer: Callable[..., Any]
    form: Form
    idle: Callable[[Any], int]
    words: str
    color: tuple[str, str]
    marker: tuple[str, str]
    widths: tuple[str, ...] = ("num_experts", "top_k")
    units: str = "experts"
    router: str = "linear"
    model_options: frozenset[str] = _CONTEXT


METHODS: dict[str, Method] = {
    "dense": Method(
        label="Dense",
        layer=DenseFFN,
        form="dense",
        idle=lambda layer: 0,
        words="width {width}",
        color=("#2f3742", "#d9dfe7"),
        marker=("o", "\N{BLACK CIRCLE}"),
        widths=(),
        model_options=_TABLES | {"input_context"},
    ),
    "gated": Method(
        label="Gated dense",
        layer=GatedFFN,
        form="dense",
        idle=lambda layer: 0,
        words="gated, width {width}",
        color=("#5c3612", "#ffd600"),
        marker=("p", "\N{BLACK PENTAGON}"),
        widths=(),
    ),
    "moe": Method(
        label="Standard MoE",
        layer=StandardMoE,
        form="experts",
        idle=lambda layer: (
            (layer.num_experts - layer.router.top_k) * sum(each[0].numel() for each in layer.experts.parameters())
        ),
        words="{num_experts} experts of {width}, top-{top_k}",
        color=("#bb5806", "#f2973a"),
        marker=("s", "\N{BLACK SQUARE}"),
    ),
    "mixture_of_loras": Method(
        label="Mixture-of-LoRAs",
        layer=MixtureOfLoRAs,
        form="update",
        idle=lambda layer: (layer.num_experts - layer.router.top_k) * 2 * layer.rank * layer.in_features,
        words="{num_experts} experts of rank {rank}, top-{top_k}",
        color=("#0b8668", "#25b48f"),
        marker=("^", "\N{BLACK UP-POINTING TRIANGLE}"),
        widths=("num_experts", "top_k", "rank"),
        units="LoRAs",
        model_options=_UPDATE,
    ),
    "peer": Method(
        label="PEER",
        layer=PEER,
        form="update",
        idle=lambda layer: (layer.num_experts - layer.top_k) * 2 * layer.in_features,
        words="{num_experts} experts of one neuron, top-{top_k}",
        color=("#a12a8c", "#e07fd0"),
        marker=("v", "\N{BLACK DOWN-POINTING TRIANGLE}"),
        router="product_key",
        model_options=_UPDATE,
    ),
    "dsc": Method(
        label="DSC",
        layer=DSC,
        form="update",
        idle=lambda layer: (
            (layer.options.num_atoms - layer.options.top_k) * (layer.bank.in_features + layer.bank.out_features)
        ),
        words="M {num_atoms}{shared}, K {top_k}",
        color=("#2257e0", "#7d9dff"),
        marker=("D", "\N{BLACK DIAMOND}"),
        widths=("num_atoms", "top_k"),
        units="atoms",
        model_options=_UPDATE | {"share_bank", "attention_rank"},
    ),
}
"""The methods by name, in the order of tables and figures."""
