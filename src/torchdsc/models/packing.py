"""Positions and attention masks, also for several sequences packed in a row."""

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import create_causal_mask

from torchdsc.nn.packing import number_sequences

from .configuration import DSCGPTConfig


def find_positions(
    config: DSCGPTConfig, inputs_embeds: Tensor, position_ids: Tensor | None, cache: Cache | None
) -> Tensor:
    """Positions as given, or counted on from the cache.

    Args:
        config: The model's.
        inputs_embeds: Shape (B, T, d).
        position_ids: Shape (B, T) or (1, T), or None.
        cache: Key-value cache, or None.

    Returns:
        Positions of shape (B, T) or (1, T).

    Raises:
        ValueError: If a position is outside [0, ``max_position_embeddings``).
    """
    length, most = inputs_embeds.shape[1], config.max_position_embeddings
    seen = cache.get_seq_length() if cache is not None else 0
    total = seen + length if isinstance(seen, int) else None
    if position_ids is None:
        if total is not None and total > most:
            raise ValueError(f"a sequence must have at most max_position_embeddings = {most} tokens, got {total}")
        position_ids = (torch.arange(length, device=inputs_embeds.device) + seen).unsqueeze(0)
    check_positions(position_ids, total, most)
    return position_ids


def make_masks(
    config: DSCGPTConfig,
    inputs_embeds: Tensor,
    attention_mask: Tensor | dict[str, Tensor | None] | None,
    cache: Cache | None,
    position_ids: Tensor | None,
) -> tuple[Tensor | None, Tensor | None]:
    """Make the mask for attention and the padding mask of the T tokens.

    Args:
        config: The model's.
        inputs_embeds: Shape (B, T, d).
        attention_mask: As given to the model.
        cache: Key-value cache, or None.
        position_ids: As given to the model, of shape (B, T) or (1, T), or None.

    Returns:
        A mask for the attention function, or None for a plain causal one; and a bool padding mask of shape (B, T),
        False for padding, or None if unknown.

    Raises:
        ValueError: If sequences are packed although the cache already holds tokens.
    """
    if isinstance(attention_mask, dict):
        # Made beforehand by generation with a static cache, a mask for each kind of layer.
        tokens = attention_mask.get("linear_attention")
        return attention_mask["full_attention"], None if tokens is None else tokens.bool()
    if isinstance(cache, DynamicCache) and cache.get_seq_length() == 0:
        # An empty cache changes no mask, and transformers separates packed sequences only without a cache.
        cache = None
    # Positional, because transformers 5.24 renamed the cache argument.
    causal_mask: Tensor | None = create_causal_mask(
        config, inputs_embeds, attention_mask, cache, position_ids=position_ids
    )
    length, token_mask = inputs_embeds.shape[1], None
    if attention_mask is not None and attention_mask.dim() == 2 and attention_mask.shape[1] >= length:
        token_mask = attention_mask[:, attention_mask.shape[1] - length :].bool()
    if position_ids is not None and length > 1:
        causal_mask = _separated(causal_mask, attention_mask, token_mask, cache, position_ids)
    return causal_mask, token_mask


def _separated(
    causal_mask: Tensor | None,
    attention_mask: Tensor | None,
    token_mask: Tensor | None,
    cache: Cache | None,
    position_ids: Tensor,
) -> Tensor | None:
    """The mask, with packed sequences separated if transformers has not done it."""
    if cache is None:
        # Without padding transformers has separated them; a mask of four dimensions is the caller's to separate.
        if token_mask is None or attention_mask is None or attention_mask.shape != token_mask.shape:
            return causal_mask
        sequences = number_sequences(position_ids, token_mask)
        return causal_mask if sequences is None else separate(causal_mask, sequences)
    is_own = attention_mask is not None and token_mask is None
    if not is_own and not torch.compiler.is_compiling() and number_sequences(position_ids, token_mask) is not None:
        raise ValueError(
            "position_ids must go on from token to token with past_key_values that hold some, got sequences packed "
            "in one: a cache goes on with one a row"
        )
    return causal_mask


def check_positions(position_ids: Tensor, length: int | None, most: int) -> None:
    """Refuse positions outside [0, ``most``).

    On a GPU, positions are only read back, which waits for the device, if a row of ``length`` tokens (None if unknown)
    is longer than ``most``. Otherwise, and when compiled, the embedding's own assertion refuses them.

    Raises:
        ValueError: If a position is outside.
    """
    is_long = length is not None and length > most
    if torch.compiler.is_compiling() or position_ids.is_meta or position_ids.numel() == 0:
        return
    if position_ids.device.type == "cpu" or is_long:
        low, high = map(int, torch.aminmax(position_ids))
        if low < 0 or high >= most:
            raise ValueError(
                f"position_ids must be in [0, max_position_embeddings = {most}), got positions from {low} to {high}"
            )


def separate(mask: Tensor | None, sequences: Tensor) -> Tensor:
    """Make a causal attention mask that also separates packed sequences.

    Args:
        mask: Shape (B, 1, T, T), bool or additive; None for a plain causal one.
        sequences: From :func:`number_sequences`.

    Returns:
        A mask of shape (B, 1, T, T), bool or additive as ``mask``.
    """
    same = (sequences.unsqueeze(2) == sequences.unsqueeze(1)).unsqueeze(1)
    if mask is None:
        return same.tril()
    return mask & same if mask.dtype == torch.bool else mask.masked_fill(~same, torch.finfo(mask.dtype).min)
