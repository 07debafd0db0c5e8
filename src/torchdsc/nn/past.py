"""The embeddings of the last tokens, kept in transformers' cache beside keys and values."""

import sys
from typing import Any

from torch import Tensor


def after_past(x: Tensor, past_tokens: int, cache: Any) -> Tensor:
    """The embeddings ``x``, preceded by those of earlier tokens that the cache holds."""
    if cache is None:
        return x
    index = _index(cache)
    if index is None:
        if cache.get_seq_length() == 0:
            return x
        raise ValueError(
            "past_key_values must be a transformers Cache that this model has filled from its first token on, got one "
            "that holds tokens whose embeddings are not in it"
        )
    # The cache stores (B, d, T).
    seen: Tensor = cache.update_conv_state(x.mT, index, conv_kernel_size=past_tokens).mT
    return seen


def keep_past(sequences: Tensor, past_tokens: int, cache: Any) -> None:
    """Append the layer for embeddings to a cache that has none yet."""
    if not hasattr(cache, "layers"):
        raise ValueError(f"past_key_values must be a transformers Cache with layers, got a {type(cache).__name__}")
    if _index(cache) is None:
        cache.layers.append(_layer_class()())
        cache.update_conv_state(sequences.detach().mT, len(cache.layers) - 1, conv_kernel_size=past_tokens)


def _index(cache: Any) -> int | None:
    kind = _layer_class()
    return next((i for i, layer in enumerate(getattr(cache, "layers", ())) if isinstance(layer, kind)), None)


# The class of the layer, once it is made: torch.compile takes a class, but not its making.
_made: list[Any] = []


def prepare_cache() -> None:
    """Make the layer for transformers' cache, where transformers is in use, before anything is compiled."""
    if "transformers" in sys.modules:
        _layer_class()


def _layer_class() -> Any:
    if not _made:
        _made.append(_make_layer_class())
    return _made[0]


def _make_layer_class() -> Any:
    # Made here, so that transformers is imported late.
    from transformers.cache_utils import LinearAttentionLayer

    class EmbeddingsLayer(LinearAttentionLayer):  # type: ignore[misc]
        """A layer of transformers' cache that keeps the last embeddings, in the place of a convolution's state."""

        def batch_repeat_interleave(self, repeats: int) -> None:
            self.conv_states[0] = self.conv_states[0].repeat_interleave(repeats, dim=0)

        def batch_select_indices(self, indices: Tensor) -> None:
            self.conv_states[0] = self.conv_states[0][indices, ...]

        def crop(self, max_length: int) -> None:
            raise NotImplementedError(
                "tokens cannot be taken back from this cache, as it keeps the embeddings of the last ones alone: "
                "assisted generation (assistant_model, prompt_lookup_num_tokens) is not supported by adapters and "
                "converted models whose layers see embeddings"
            )

    return EmbeddingsLayer


def cache_of(output: Any) -> Any:
    """The cache among a model's outputs."""
    if isinstance(output, dict):
        return output.get("past_key_values", output.get("cache"))
    parts = output if isinstance(output, tuple) else ()
    return next((part for part in parts if hasattr(part, "get_seq_length")), None)
