"""The feed-forward methods that are compared: all that tells one from another is said here, once."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from torchdsc.nn import DSC, DenseFFN

from .mixture_of_loras import MixtureOfLoRAs
from .moe import StandardMoE
from .peer import PEER

FeedForwardKind = Literal["dense", "moe", "mixture_of_loras", "peer", "dsc"]
Form = Literal["dense", "experts", "update"]
_CONTEXT = frozenset({"router_input", "router_context", "input_context"})


@dataclass(frozen=True)
class Method:
    """A feed-forward layer, as models are built with it and comparisons show it.

    Attributes:
        label: What it is called in tables and figures.
        layer: Its class, called as ``layer(d, width, **options)``, or ``layer(d, **options)`` for an update.
        form: Where the width is, by which the layer is built and solved for a budget: "dense" for one layer of that
            width, "experts" for experts of it, "update" for a layer without one, which is added to a static layer of
            that width.
        idle: Parameters of a built layer that a token leaves idle.
        words: A plan in words, with fields for the ``width``, ``shared`` of a bank, and options.
        color: Of its marks in figures, on a light page and on a dark one.
        marker: Of matplotlib, and the same as a character.
        widths: Options that the budget solver sets: the number of units, how many a token takes, and their rank.
        units: What a token selects, in the plural.
        router: Kind of router where no option says another.
        model_options: Options that concern the model around the layer, fields of its ``ModelOptions``.
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
        model_options=frozenset({"input_context"}),
    ),
    "moe": Method(
        label="Standard MoE",
        layer=StandardMoE,
        form="experts",
        idle=lambda layer: (layer.num_experts - layer.router.top_k) * 2 * layer.experts.up_proj[0].numel(),
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
    ),
    "dsc": Method(
        label="DSC",
        layer=DSC,
        form="update",
        idle=lambda layer: (layer.options.num_atoms - layer.options.top_k) * 2 * layer.in_features,
        words="M {num_atoms}{shared}, K {top_k}",
        color=("#2257e0", "#7d9dff"),
        marker=("D", "\N{BLACK DIAMOND}"),
        widths=("num_atoms", "top_k"),
        units="atoms",
        model_options=_CONTEXT | {"share_bank", "attention_rank"},
    ),
}
"""In the order of every table and figure."""
