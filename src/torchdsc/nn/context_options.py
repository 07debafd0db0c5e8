"""Options of what a layer and its router see of the tokens before, and of the static layer beside it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, Self

from torchdsc.arguments import check_at_least, check_types
from torchdsc.ops.ngrams import check_orders

from .options import AssignedOnce, DSCArguments

RouterInput = Literal["hidden", "embeddings"]
StaticKind = Literal["dense", "gated"]


@dataclass(kw_only=True)
class ContextFields:
    """What a layer and its router see of the tokens before: short convolutions and n-grams.

    Attributes:
        router_input: "hidden" if the router sees the layer's input, "embeddings" if it sees the token embeddings,
            normalised and without positions.
        router_context: Width of the short convolution over the router's input: the token and those before it. 1 for
            none.
        input_context: Width of the short convolution over the token embeddings that is added to the layer's input. 1
            for none.
        ngram_orders: The numbers of tokens n that ``router="ngram"`` hashes. It selects as many atoms by each.
    """

    router_input: RouterInput = "hidden"
    router_context: int = 1
    input_context: int = 1
    ngram_orders: Sequence[int] = (2, 3)


@dataclass(kw_only=True, unsafe_hash=True)
class ContextOptions(AssignedOnce, ContextFields):
    """:class:`ContextFields`, checked, and what they depend on.

    Attributes:
        static: Kind of the static layer, where one is built: "dense", or "gated" for a :class:`torchdsc.nn.GatedFFN`
            whose gate sees what the router sees, normalised. With ``router="ngram"`` the gate sees what another router
            would.
        routes_by_ngrams: Whether the router is of the kind "ngram"; not an option itself.

    Raises:
        TypeError: If an option has another type.
        ValueError: If one is out of its range, or does not go with the others.
    """

    static: StaticKind = "dense"
    routes_by_ngrams: bool = False

    def __post_init__(self) -> None:
        check_types(type(self), vars(self))
        check_orders(self.ngram_orders)
        # Files hold lists, which have no hash.
        vars(self)["ngram_orders"] = tuple(self.ngram_orders)
        check_at_least(1, router_context=self.router_context, input_context=self.input_context)
        if self.input_context > 1 and self.router_context > 1 and self.router_input == "hidden":
            raise ValueError("router_input must be 'embeddings' for contexts of layer and router, got 'hidden'")
        if self.hashes_ngrams and self.router_input == "hidden" and self.router_context > 1:
            raise ValueError("router_input must be 'embeddings' for a router_context beside n-grams, got 'hidden'")

    def check_atoms(self, top_k: Any, num_atoms: Any = None) -> None:
        """Raise a ValueError unless an n-gram router, if there is one, can select as many atoms by each order.

        What is None or no int is left to the layer's own checks.
        """
        if not self.routes_by_ngrams:
            return
        orders = len(self.ngram_orders)
        if isinstance(num_atoms, int) and num_atoms < orders:
            raise ValueError(f"num_atoms must be at least {orders}, one for each order of n-grams, got {num_atoms}")
        if isinstance(top_k, int) and top_k % orders:
            raise ValueError(f"top_k must be a multiple of the {orders} orders of n-grams, got {top_k}")

    def beside(self, *, gate: bool) -> Self:
        """These options without what nobody sees: beside an n-gram router, ``router_input`` is for a ``gate`` alone."""
        unseen = self.routes_by_ngrams and not gate
        return replace(self, router_input="hidden", router_context=1) if unseen else self

    @property
    def hashes_ngrams(self) -> bool:
        """Whether anything is addressed by n-grams, and so needs token ids."""
        return self.routes_by_ngrams

    @property
    def orders_seen(self) -> Sequence[int]:
        """``ngram_orders``, or none where nothing is addressed by n-grams."""
        return self.ngram_orders if self.hashes_ngrams else ()

    @property
    def embeddings_are_seen(self) -> bool:
        """Whether the layer or the router sees token embeddings."""
        return self.router_input == "embeddings" or self.input_context > 1

    @property
    def tokens_are_seen(self) -> bool:
        """Whether anything sees token embeddings or ids."""
        return self.embeddings_are_seen or self.hashes_ngrams

    @property
    def past_tokens(self) -> int:
        """How many earlier tokens the widest short convolution or n-gram sees."""
        return max(self.router_context, self.input_context, *self.orders_seen) - 1

    @property
    def context_rows(self) -> int:
        """Number of parameters of the short convolutions, in multiples of d."""
        return sum(tokens for tokens in (self.router_context, self.input_context) if tokens > 1)


class FeedForwardArguments(DSCArguments, total=False):
    """The fields of :class:`DSCOptions` and :class:`ContextOptions` as keywords."""

    router_input: RouterInput
    router_context: int
    input_context: int
    ngram_orders: Sequence[int]
    static: StaticKind


def split_context(options: Mapping[str, Any]) -> tuple[ContextOptions, dict[str, Any]]:
    """Split options into those of the contexts and those of the layer.

    Raises:
        TypeError: If an option of the contexts has another type.
        ValueError: If one is out of its range, or does not go with the others.
    """
    names = {"static", *(field.name for field in fields(ContextFields))}
    own = {name: value for name, value in options.items() if name in names}
    context = ContextOptions(**own, routes_by_ngrams=options.get("router") == "ngram")
    context.check_atoms(options.get("top_k"), options.get("num_atoms"))
    return context, {name: value for name, value in options.items() if name not in names}
