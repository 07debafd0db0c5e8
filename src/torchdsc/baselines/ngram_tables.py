"""Hashed n-gram embedding tables: a memory addressed by the last tokens, read through a gate of the hidden state."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from torchdsc.arguments import check_at_least, check_types
from torchdsc.ops import ngram_rows


class NgramTables(nn.Module):
    """``y = sigmoid(<norm(x), norm(e W_k)> / sqrt(d)) (e W_v)``, with e the rows of the n-grams that end at a token.

    Each n-gram order has ``heads`` tables with hash functions of their own, and e is the concatenation of one row of
    each. A token reads few rows however many there are, and knows which before the model runs.

    Args:
        features: d.
        rows: Rows of all tables together, rounded down to a multiple of the number of tables.
        orders: How many kinds of n-grams there are, for example 2 for pairs and triples.
        heads: Tables for each order.
        row_features: Width w of a row; by default d over the number of tables, rounded up.
        salt: Another one gives other collisions: that of a layer should be its index.
        device: Where the parameters live.
        dtype: Their dtype.

    Attributes:
        row_parameters: Names of parameters of which a token uses few rows, with a learning rate of their own in
            :func:`torchdsc.parameter_groups`.
        tables: nn.Embedding of all tables, one after the other, normal of standard deviation 0.02 at the start.
        key: W_k, of shape (d, n w) with n the number of tables.
        value: W_v, likewise.

    Raises:
        TypeError: If an argument has another type.
        ValueError: If a size is below 1, or ``rows`` smaller than the number of tables.
    """

    row_parameters = ("tables.weight",)

    def __init__(
        self,
        features: int,
        rows: int,
        *,
        orders: int = 2,
        heads: int = 4,
        row_features: int | None = None,
        salt: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_types(NgramTables.__init__, locals())
        check_at_least(1, features=features, orders=orders, heads=heads, row_features=row_features)
        self.features, self.heads, self.salt = features, heads, salt
        self.num_tables = heads * orders
        check_at_least(self.num_tables, rows=rows)
        self.rows = rows // self.num_tables
        width = -(-features // self.num_tables) if row_features is None else row_features
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.tables = nn.Embedding(self.num_tables * self.rows, width, **factory)
        self.key = nn.Linear(self.num_tables * width, features, bias=False, **factory)
        self.value = nn.Linear(self.num_tables * width, features, bias=False, **factory)
        nn.init.normal_(self.tables.weight, std=0.02)

    @property
    def idle(self) -> int:
        """Number of parameters that any one token leaves alone."""
        return (self.rows - 1) * self.num_tables * self.tables.embedding_dim

    def forward(self, x: Tensor, codes: Tensor) -> Tensor:
        """Read the tables.

        Args:
            x: Hidden states of shape (..., T, d).
            codes: Of n-grams, from :func:`torchdsc.ops.ngram_codes`, of shape (..., T, orders).

        Returns:
            Tensor of the shape of ``x``.
        """
        rows = ngram_rows(codes, self.heads, self.rows, salt=self.salt)
        read = self.tables(rows + self.rows * torch.arange(self.num_tables, device=rows.device)).flatten(-2)
        width = (self.features,)
        alike = functional.layer_norm(x, width) * functional.layer_norm(self.key(read), width)
        gate = torch.sigmoid(alike.sum(-1, keepdim=True) / self.features**0.5)
        y: Tensor = gate * self.value(read)
        return y

    def extra_repr(self) -> str:
        """Sizes, for ``print(model)``."""
        return f"features={self.features}, tables={self.num_tables}, heads={self.heads}, rows={self.rows}"
