"""Rows of n-grams: the same everywhere, spread evenly, apart from table to table, and never across sequences."""

import pytest
import torch

from torchdsc.ops import ngram_codes, ngram_rows

# Rows of the last place of the tokens 5, 1, 2, 3.
EXPECTED = [880, 384, 1004, 707, 551, 52]


def rows_of(tokens, orders=(1, 2, 3), tables=2, rows=1009, salt=0):
    return ngram_rows(ngram_codes(torch.as_tensor(tokens), orders), tables, rows, salt=salt)


def test_an_ngram_has_the_same_rows_everywhere():
    rows = rows_of([[5, 1, 2, 3], [7, 8, 2, 3]])
    assert rows.shape == (2, 4, 6)
    assert rows.min() >= 0
    assert rows.max() < 1009
    # The last one and two tokens are those of the other sequence, the last three are not.
    assert torch.equal(rows[0, 3, :4], rows[1, 3, :4])
    assert (rows[0, 3, 4:] != rows[1, 3, 4:]).all()


def test_order_and_place_of_tokens_matter():
    assert (rows_of([1, 2])[1, 2:4] != rows_of([2, 1])[1, 2:4]).all()
    # What is before the first token is no token 0.
    assert (rows_of([0, 3])[1, 4:] != rows_of([3])[0, 4:]).all()


def test_rows_are_fixed_for_good():
    # Known values: another hash would silently give a saved model the rows of other n-grams.
    assert rows_of([5, 1, 2, 3])[3].tolist() == EXPECTED
    assert rows_of([5, 1, 2, 3], salt=1)[3].tolist() != EXPECTED


def test_tables_and_salts_collide_with_others():
    tokens = torch.arange(2000)
    rows = rows_of(tokens, (1,), 3, 50, salt=4)
    other = rows_of(tokens, (1,), 3, 50, salt=5)
    for first, second in ((rows[:, 0], rows[:, 1]), (rows[:, 1], rows[:, 2]), (rows[:, 0], other[:, 0])):
        # Independent rows agree once in 50.
        assert 10 < (first == second).sum() < 80


def test_rows_are_used_evenly():
    counts = torch.bincount(rows_of(torch.arange(16_000), (1,), 1, 16).flatten(), minlength=16)
    # Chi-square with 15 degrees of freedom: 0.1 % above 37.7.
    assert ((counts - 1000) ** 2 / 1000).sum() < 37.7


@pytest.mark.parametrize("cut", [1, 2, 4])
def test_the_past_counts(cut):
    tokens = torch.randint(50, (2, 7))
    assert torch.equal(ngram_codes(tokens, (2, 3), length=cut), ngram_codes(tokens, (2, 3))[:, -cut:])


def test_packed_sequences_do_not_see_each_other():
    tokens = torch.randint(50, (1, 9))
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 0, 1, 2]])
    codes = ngram_codes(tokens, (1, 2, 3), positions=positions)
    parts = [ngram_codes(part, (1, 2, 3)) for part in tokens.split([4, 2, 3], dim=1)]
    assert torch.equal(codes, torch.cat(parts, 1))
    # The end of a longer row, as with a cache.
    assert torch.equal(codes[:, 4:], ngram_codes(tokens, (1, 2, 3), length=5, positions=positions[:, 4:]))


def test_large_ids():
    assert rows_of([2**31 - 2, 2**31 - 3], (1, 2), 1, 10**6).unique().numel() == 4


def test_dtype():
    with pytest.raises(TypeError, match=r"tokens must be int64, got torch\.int32"):
        ngram_codes(torch.zeros(3, dtype=torch.int32), (2,))


@pytest.mark.parametrize("orders", [(), (0, 2)])
def test_orders(orders):
    with pytest.raises(ValueError, match=r"ngram_orders must be numbers of tokens, each 1 or more, got \("):
        ngram_codes(torch.zeros(3, dtype=torch.int64), orders)


@pytest.mark.parametrize("rows", [0, (5,), (5, 0), (5, 5, 5)])
def test_rows(rows):
    with pytest.raises(ValueError, match=r"rows must be a number >= 1, or one for each of 2 orders, got "):
        ngram_rows(torch.zeros(3, 2, dtype=torch.int64), 2, rows)


def test_codes_and_tables_and_length():
    with pytest.raises(TypeError, match=r"codes must be int64, got torch\.float32"):
        ngram_rows(torch.zeros(3, 2), 2, 5)
    with pytest.raises(ValueError, match="tables must be >= 1, got 0"):
        ngram_rows(torch.zeros(3, 2, dtype=torch.int64), 0, 5)
    with pytest.raises(ValueError, match=r"length must be in \[0, 5\], got 9"):
        ngram_codes(torch.arange(5), (2,), length=9)
