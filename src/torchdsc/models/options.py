"""What of a DSCGPT's feed-forward options concerns the model around the layers."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torchdsc.arguments import check_at_least
from torchdsc.baselines.methods import METHODS, FeedForwardKind
from torchdsc.nn import ContextOptions

__all__ = ["FeedForwardKind", "ModelOptions", "split_options"]


@dataclass(kw_only=True, unsafe_hash=True)
class ModelOptions(ContextOptions):
    """Feed-forward options that concern the model around the layers: what these see, and what they share.

    A dense layer, which has no router, takes ``input_context`` alone.

    Attributes:
        share_bank: One bank for the DSC layers of all blocks.
        attention_rank: Rank of a router of its own, by which the bank of a block's DSC layer updates the output
            projection of its attention too; 0 leaves that as it is.

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
    """Options of the model, and those that are left for its layers."""
    names = METHODS[kind].model_options
    own = {name: value for name, value in options.items() if name in names}
    return ModelOptions(**own), {name: value for name, value in options.items() if name not in names}
