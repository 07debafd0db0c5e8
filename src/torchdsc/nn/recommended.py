"""The settings that are recommended, as keywords."""

from typing import Literal, Unpack

from .context_options import FeedForwardArguments


def recommended(
    by: Literal["embeddings", "ngrams"] = "embeddings", **changes: Unpack[FeedForwardArguments]
) -> FeedForwardArguments:
    """Settings that this project's studies found best for DSC; defaults elsewhere are the paper's.

    A short convolution over the embeddings of a token and the three before it is added to the layer's input. L_frame
    has no weight. Atoms are selected in one of two ways:

    * "embeddings": a linear router sees a short convolution over the embeddings of a token and the two before it. Each
      token selects 32 atoms, and gamma starts at 1. A gated dense layer of the same embeddings is as good or better.
    * "ngrams", for banks of many times what a token uses: the last one, two and three tokens are hashed to six atoms
      each, and gamma starts at 4. The static layer is gated by that short convolution. Atoms train best at four times
      the learning rate (``atom_lr_multiplier`` of :func:`torchdsc.build_optimizer`).

    Args:
        by: What atoms are selected by.
        **changes: Options of :class:`DSCOptions` and :class:`ContextOptions` to add or override. ``num_atoms`` is
            required unless it is solved for a budget.

    Returns:
        Keyword arguments for :class:`torchdsc.DSCFeedForward` (whose defaults are those of "embeddings"),
        :func:`torchdsc.convert` and ``feed_forward_options`` of DSCGPT; those of "embeddings" also for
        ``DSCAdapterConfig``, which has no static layer to gate.

    Raises:
        TypeError: If an option is unknown.
        ValueError: If ``by`` is neither.
    """
    unknown = [*changes.keys() - FeedForwardArguments.__annotations__.keys()]
    if unknown:
        raise TypeError(f"changes must be options of DSCOptions or ContextOptions, got {sorted(unknown)}")
    if by not in ("embeddings", "ngrams"):
        raise ValueError(f"by must be 'embeddings' or 'ngrams', got {by!r}")
    settings: FeedForwardArguments = {
        "top_k": 32,
        "gamma_init": 1.0,
        "frame_weight": 0.0,
        "router_input": "embeddings",
        "router_context": 3,
        "input_context": 4,
    }
    if by == "ngrams":
        settings |= {
            "router": "ngram",
            "ngram_orders": (1, 2, 3),
            "top_k": 18,
            "gamma_init": 4.0,
            "static": "gated",
        }
    return {**settings, **changes}
