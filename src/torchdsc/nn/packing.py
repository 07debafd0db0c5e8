"""Sequences packed in a row."""

import torch
from torch import Tensor


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
