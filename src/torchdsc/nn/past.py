"""The embeddings of the last tokens, kept in transformers' cache beside keys and values."""

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


def _layer_class() -> Any:
    # Imported late, as transformers is.
    from .embeddings_layer import EmbeddingsLayer

    return EmbeddingsLayer


def cache_of(output: Any) -> Any:
    """The cache among a model's outputs."""
    if isinstance(output, dict):
        return output.get("past_key_values", output.get("cache"))
    parts = output if isinstance(output, tuple) else ()
    return next((part for part in parts if hasattr(part, "get_seq_length")), None)
