"""What of a DSCGPT's feed-forward options concerns the model around the layers."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torchdsc.arguments import check_at_least, check_types
from torchdsc.baselines.methods import METHODS, FeedForwardKind

__all__ = ["FeedForwardKind", "ModelOptions", "split_options"]

RouterInput = Literal["hidden", "embeddings"]


@dataclass(frozen=True)
class ModelOptions:
    """Feed-forward options that concern the model around the layers. A dense layer, which has no router, takes
    ``input_context`` alone.

    Attributes:
        router_input: What the routers of all feed-forward layers see: "hidden", what the layers do, or "embeddings",
            those of the tokens, normalised and without positions.
        router_context: Tokens whose mix a router sees, a token's own and those before it; 1 for its own alone.
        input_context: Tokens whose embeddings are mixed, a token's own and those before it, and added to what a layer
            sees; 1 for none.
        share_bank: One bank for the DSC layers of all blocks.
        attention_rank: Rank of a router of its own, by which the bank of a block's DSC layer updates the output
            projection of its attention too; 0 leaves that as it is.

    Raises:
        TypeError: If an option has another type.
        ValueError: If one is out of its range.
    """

    router_input: RouterInput = "hidden"
    router_context: int = 1
    input_context: int = 1
    share_bank: bool = False
    attention_rank: int = 0

    def __post_init__(self) -> None:
        check_types(ModelOptions, vars(self))
        check_at_least(1, router_context=self.router_context, input_context=self.input_context)
        check_at_least(0, attention_rank=self.attention_rank)
        if self.input_context > 1 and self.router_context > 1 and self.router_input == "hidden":
            raise ValueError("router_input must be 'embeddings' for contexts of layer and router, got 'hidden'")

    @property
    def embeddings_are_seen(self) -> bool:
        """Whether a layer or a router sees those of the tokens."""
        return self.router_input == "embeddings" or self.input_context > 1

    @property
    def past_tokens(self) -> int:
        """Tokens before its own that a block sees through its contexts."""
        return max(self.router_context, self.input_context) - 1

    @property
    def context_rows(self) -> int:
        """Rows of d parameters that the contexts add to a block."""
        return sum(tokens for tokens in (self.router_context, self.input_context) if tokens > 1)


def split_options(kind: FeedForwardKind, options: Mapping[str, Any]) -> tuple[ModelOptions, dict[str, Any]]:
    """Options of the model, and those that are left for its layers."""
    names = METHODS[kind].model_options
    own = {name: value for name, value in options.items() if name in names}
    return ModelOptions(**own), {name: value for name, value in options.items() if name not in names}
