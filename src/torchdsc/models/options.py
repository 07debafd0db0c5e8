"""The part of DSCGPT's feed-forward options that concerns the model around the layers."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torchdsc.arguments import check_at_least
from torchdsc.baselines import NgramTables
from torchdsc.baselines.methods import METHODS
from torchdsc.kinds import FeedForwardKind
from torchdsc.nn import ContextOptions

__all__ = ["ModelOptions", "split_options"]


@dataclass(kw_only=True, unsafe_hash=True)
class ModelOptions(ContextOptions):
    """Feed-forward options that concern the model around the layers: short convolutions, and shared banks.

    A dense layer, which has no router, takes only ``input_context``. To a gated one, the router is its gate.

    Attributes:
        share_bank: One bank for the DSC layers of all blocks.
        attention_rank: Rank of an additional low-rank router in each block, by which the bank of its DSC layer also
            updates the attention's output projection; 0 for none.
        ngram_rows: Rows of the hashed n-gram tables beside each feed-forward layer, see
            :class:`torchdsc.baselines.NgramTables`; 0 for no tables.
        ngram_heads: Tables for each order of n-grams, which are ``ngram_orders``.

    Raises:
        TypeError: If an option has another type.
        ValueError: If one is out of its range.
    """

    share_bank: bool = False
    attention_rank: int = 0
    ngram_rows: int = 0
    ngram_heads: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(0, attention_rank=self.attention_rank, ngram_rows=self.ngram_rows)
        check_at_least(1, ngram_heads=self.ngram_heads)

    @property
    def hashes_ngrams(self) -> bool:
        """Whether anything in a block is addressed by n-grams."""
        return self.routes_by_ngrams or self.ngram_rows > 0

    def build_tables(self, features: int, layer: int) -> NgramTables | None:
        """The n-gram tables of a block, d = ``features``; None if there are none."""
        if not self.ngram_rows:
            return None
        orders = len(self.ngram_orders)
        return NgramTables(features, self.ngram_rows, orders=orders, heads=self.ngram_heads, salt=layer)


def split_options(kind: FeedForwardKind, options: Mapping[str, Any]) -> tuple[ModelOptions, dict[str, Any]]:
    """Split options into those of the model and those of its layers.

    Options of what no layer sees are among the model's until :meth:`ContextOptions.beside` is asked for the others.

    Raises:
        TypeError: If an option of the model has another type.
        ValueError: If one is out of its range, or does not go with the others or those of the layers.
    """
    names = METHODS[kind].model_options
    own = {name: value for name, value in options.items() if name in names}
    own["routes_by_ngrams"] = options.get("router") == "ngram"
    model = ModelOptions(**own)
    model.check_atoms(options.get("top_k"), options.get("num_atoms"))
    return model, {name: value for name, value in options.items() if name not in names}
