"""The part of DSCGPT's feed-forward options that concerns the model around the layers."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torchdsc.arguments import check_at_least
from torchdsc.baselines.methods import METHODS, FeedForwardKind
from torchdsc.nn import ContextOptions

__all__ = ["FeedForwardKind", "ModelOptions", "split_options"]


@dataclass(kw_only=True, unsafe_hash=True)
class ModelOptions(ContextOptions):
    """Feed-forward options that concern the model around the layers: short convolutions, and shared banks.

    A dense layer, which has no router, takes only ``input_context``.

    Attributes:
        share_bank: One bank for the DSC layers of all blocks.
        attention_rank: Rank of an additional low-rank router in each block, by which the bank of its DSC layer also
            updates the attention's output projection; 0 for none.

    Raises:
        TypeError: If an option has another type.
        ValueError: If one is out of its range.
    """

    share_bank: bool = False
    attention_rank: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(0, attention_rank=self.attention_rank)


def split_options(kind: FeedForwardKind, options: Mapping[str, Any]) -> tuple[ModelOptions, dict[str, Any]]:
    """Split options into those of the model and those of its layers."""
    names = METHODS[kind].model_options
    own = {name: value for name, value in options.items() if name in names}
    return ModelOptions(**own), {name: value for name, value in options.items() if name not in names}
