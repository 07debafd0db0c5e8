"""Several sequences packed in one row."""

import torch
from torch import Tensor


def number_sequences(position_ids: Tensor, token_mask: Tensor | None) -> Tensor | None:
    """Number the sequences packed in each row: a new one begins where the position does not increase.

    Args:
        position_ids: Shape (B, T) or (1, T).
        token_mask: Padding mask of shape (B, T), False for padding, which belongs to the sequence before it.

    Returns:
        The number of each token's sequence, of shape (B, T) or (1, T). None if every row is one sequence; under
        ``torch.compile``, where that cannot be asked, always the numbers.
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
