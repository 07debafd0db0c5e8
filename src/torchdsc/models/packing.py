"""Positions of tokens: whether the model has them, and which sequence of those packed in one a token belongs to."""

import torch
from torch import Tensor


def check_positions(position_ids: Tensor, length: int | None, most: int) -> None:
    """Refuse positions outside [0, ``most``).

    Values on an accelerator are waited for only where a row of ``length`` tokens (None if unknown) is longer than
    ``most``; the embedding's own assertion on the device refuses the others. Compiled, it does so everywhere.

    Raises:
        ValueError: If one is outside.
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


def number_sequences(position_ids: Tensor, token_mask: Tensor | None) -> Tensor | None:
    """Number the sequences packed in each row: a new one begins where the position of a token is no further on.

    Args:
        position_ids: Shape (B, T) or (1, T).
        token_mask: Shape (B, T); padding, which is False, belongs to the sequence before it.

    Returns:
        The number of each token's sequence, of shape (B, T) or (1, T); None where each row holds one, unless compiled,
        as that depends on the values.
    """
    if token_mask is not None:
        places = torch.arange(token_mask.shape[1], device=token_mask.device)
        last = torch.where(token_mask, places, 0).cummax(1).values
        position_ids = position_ids.expand_as(last).gather(1, last)
    begins = position_ids[:, 1:] <= position_ids[:, :-1]
    if token_mask is not None:
        after_some = token_mask.cumsum(1)[:, :-1] > 0
        begins = begins & token_mask[:, 1:] & after_some
    if not torch.compiler.is_compiling() and not begins.any():
        return None
    return torch.nn.functional.pad(begins, (1, 0)).cumsum(1)


def separate(mask: Tensor | None, sequences: Tensor) -> Tensor:
    """A causal attention mask, without what tokens would see of other sequences.

    Args:
        mask: Shape (B, 1, T, T), bool or to be added to scores; None for a plain causal one.
        sequences: From :func:`number_sequences`.

    Returns:
        The mask.
    """
    same = (sequences.unsqueeze(2) == sequences.unsqueeze(1)).unsqueeze(1)
    if mask is None:
        return same.tril()
    return mask & same if mask.dtype == torch.bool else mask.masked_fill(~same, torch.finfo(mask.dtype).min)
