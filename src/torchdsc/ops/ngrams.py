"""Hashing of n-grams: the last tokens of every place, mapped to rows of tables."""

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["ngram_codes", "ngram_rows"]


def _signed(value: int) -> int:
    """The low 64 bits as a signed integer."""
    value &= 2**64 - 1
    return value - 2**64 if value >= 2**63 else value


# Odd constants whose bits look random (SplitMix64); products wrap around.
_TOKEN, _FIRST, _SECOND, _SALT = map(
    _signed, (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB, 0xD6E8FEB86659FD93)
)
# Hash functions of one salt.
_FUNCTIONS = 2**20


def ngram_codes(
    tokens: Tensor, orders: Sequence[int], *, length: int | None = None, positions: Tensor | None = None
) -> Tensor:
    """A number for the n-gram that ends at each place: equal for equal n-grams, for others as if drawn at random.

    Args:
        tokens: Sequences of token ids, int64 of shape (..., T), 0 or more; -1 where there is no token, as in padding.
        orders: The numbers of tokens n, each 1 or more.
        length: Return only the last so many places, for which those before are the past; by default all.
        positions: Positions of the returned places in their sequences, counted from 0, that broadcast to (..., length).
            An n-gram stays within its sequence.

    Returns:
        Any 64-bit integers, int64 of shape (..., length, len(orders)).

    Raises:
        TypeError: If ``tokens`` is not int64.
        ValueError: If ``orders`` is empty or has a number below 1, ``length`` is not in [0, T], or there are not as
            many ``positions``.
    """
    if tokens.dtype != torch.int64:
        raise TypeError(f"tokens must be int64, got {tokens.dtype}")
    check_orders(orders)
    length = tokens.shape[-1] if length is None else length
    if not 0 <= length <= tokens.shape[-1]:
        raise ValueError(f"length must be in [0, {tokens.shape[-1]}], got {length}")
    if positions is not None and positions.shape[-1] != length:
        raise ValueError(f"positions must have shape (..., {length}), got {tuple(positions.shape)}")
    past = tokens.shape[-1] - length
    longest = max(orders)
    # 0 for what is before the first token.
    padded = torch.nn.functional.pad(tokens + 1, (longest - 1, 0))
    state, found = torch.zeros_like(tokens[..., past:]), {}
    for back in range(longest):
        begin = longest - 1 + past - back
        earlier = padded[..., begin : padded.shape[-1] - back]
        if positions is not None:
            earlier = earlier.masked_fill(positions < back, 0)
        state = found[back + 1] = _mix(state + earlier * _TOKEN)
    return torch.stack([found[order] for order in orders], dim=-1)


def ngram_rows(codes: Tensor, tables: int, rows: int | Sequence[int], *, salt: int = 0) -> Tensor:
    """Map each code to a row of each of several tables.

    Different codes collide as if rows were drawn at random, in each table with others.

    Args:
        codes: From :func:`ngram_codes`, of shape (..., n).
        tables: Tables for each order.
        rows: Rows of a table R; or of the tables of each order.
        salt: Another one gives other rows.

    Returns:
        Rows in [0, R), int64 of shape (..., n tables): the tables of the first order come first.

    Raises:
        TypeError: If ``codes`` is not int64.
        ValueError: If ``tables`` or a number of rows is below 1, or there are not as many of them as orders.
    """
    orders = codes.shape[-1]
    sizes = (rows,) * orders if isinstance(rows, int) else tuple(rows)
    if codes.dtype != torch.int64:
        raise TypeError(f"codes must be int64, got {codes.dtype}")
    if len(sizes) != orders or min(sizes) < 1:
        raise ValueError(f"rows must be a number >= 1, or one for each of {orders} orders, got {rows}")
    if tables < 1:
        raise ValueError(f"tables must be >= 1, got {tables}")
    # Integers of Python, wrapped here: compiled code would not wrap a product of an index.
    salts = [_signed((salt * _FUNCTIONS + 1 + function) * _SALT) for function in range(orders * tables)]
    hashed = _mix(codes.unsqueeze(-1) + torch.tensor(salts, device=codes.device).view(orders, tables))
    return hashed.remainder(torch.tensor(sizes, device=codes.device).unsqueeze(-1)).flatten(-2)


def check_orders(orders: Sequence[int]) -> None:
    """Raise a ValueError unless there are orders, each 1 or more."""
    if not orders or min(orders) < 1:
        raise ValueError(f"ngram_orders must be numbers of tokens, each 1 or more, got {tuple(orders)}")


def _mix(value: Tensor) -> Tensor:
    """A bijection of 64 bits that scatters neighbours; right shifts of signed integers are made unsigned ones."""
    value = (value ^ (value >> 30 & (1 << 34) - 1)) * _FIRST
    value = (value ^ (value >> 27 & (1 << 37) - 1)) * _SECOND
    return value ^ (value >> 31 & (1 << 33) - 1)
