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


def find_places(position_ids: Tensor, token_mask: Tensor | None, past_tokens: int) -> Tensor | None:
    """The place of each token in its sequence, wherever the positions of that begin.

    Args:
        position_ids: See :func:`number_sequences`.
        token_mask: See there.
        past_tokens: How far anything looks back. The first sequence of a row may have begun before the row, in a cache:
            its tokens are placed so much further on, and nothing before them is out of sight.

    Returns:
        Places of shape (B, T) or (1, T), counted from 0 but for the first sequence; None if every row is one sequence.
    """
    numbers = number_sequences(position_ids, token_mask)
    if numbers is None:
        return None
    index = torch.arange(numbers.shape[1], device=numbers.device)
    is_first_token = torch.nn.functional.pad(numbers[:, 1:] > numbers[:, :-1], (1, 0))
    return index - torch.where(is_first_token, index, -past_tokens).cummax(1).values
