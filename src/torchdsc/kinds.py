"""Names of alternatives, apart from what they name: the command line knows them without torch."""

from typing import Literal

FeedForwardKind = Literal["dense", "gated", "moe", "mixture_of_loras", "peer", "dsc"]
RouterKind = Literal["linear", "low_rank", "product_key", "ngram"]
OptimizerKind = Literal["adamw", "muon"]
