"""n-gram tables against their equation, token by token, and what a token leaves alone."""

import pytest
import torch
from torch.nn import functional

from torchdsc import parameter_groups
from torchdsc.baselines import NgramTables
from torchdsc.ops import ngram_codes, ngram_rows


@pytest.fixture
def tables():
    torch.manual_seed(0)
    return NgramTables(12, 4 * 31 + 3, orders=2, heads=2, salt=1).double()


def test_equation(tables):
    tokens, x = torch.randint(40, (2, 6)), torch.randn(2, 6, 12, dtype=torch.float64)
    codes = ngram_codes(tokens, (2, 3))
    rows = ngram_rows(codes, 2, 31, salt=1)
    weight = tables.tables.weight.view(4, 31, 3)
    for b in range(2):
        for t in range(6):
            read = torch.cat([weight[i, rows[b, t, i]] for i in range(4)])
            key, value = tables.key.weight @ read, tables.value.weight @ read
            gate = torch.sigmoid(functional.layer_norm(x[b, t], (12,)) @ functional.layer_norm(key, (12,)) / 12**0.5)
            torch.testing.assert_close(tables(x, codes)[b, t], gate * value)


def test_sizes(tables):
    assert tables.tables.weight.shape == (4 * 31, 3)
    # A token reads one row of each table.
    assert tables.idle == 4 * 30 * 3
    assert "tables=4, heads=2, rows=31" in repr(tables)


def test_only_rows_that_are_read_get_a_gradient(tables):
    tokens = torch.tensor([[4, 5]])
    codes = ngram_codes(tokens, (2, 3))
    tables(torch.randn(1, 2, 12, dtype=torch.float64), codes).sum().backward()
    touched = tables.tables.weight.grad.abs().sum(1).nonzero().flatten()
    rows = ngram_rows(codes, 2, 31, salt=1) + 31 * torch.arange(4)
    assert set(touched.tolist()) == set(rows.flatten().tolist())


def test_rate_and_decay(tables):
    groups = parameter_groups(tables, learning_rate=1.0, weight_decay=0.1, atom_lr_multiplier=4.0)
    (group,) = [group for group in groups if any(p is tables.tables.weight for p in group["params"])]
    assert (group["lr"], group["weight_decay"], len(group["params"])) == (4.0, 0.0, 1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rows": 3}, "rows must be >= 4, got 3"),
        ({"orders": 0}, "orders must be >= 1, got 0"),
        ({"heads": 0}, "heads must be >= 1, got 0"),
    ],
)
def test_errors(changes, message):
    with pytest.raises(ValueError, match=message):
        NgramTables(12, **{"rows": 40, "orders": 2, "heads": 2, **changes})
