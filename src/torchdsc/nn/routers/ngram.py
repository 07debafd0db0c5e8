"""The n-gram router: no product, no scores, a table of addresses."""

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from torchdsc.arguments import check_at_least, check_types
from torchdsc.ops import Selection, ngram_rows

from .base import Router


class NgramRouter(Router):
    """Selects the atoms that the last tokens are hashed to: for each of n orders of n-grams, K / n of M / n.

    Which atoms a token uses depends on the last tokens alone, and is known before a model runs; what they make of x
    depends on x. Logits are zero, so that the gate gives each selected atom nearly 1 / K. The router of a DSC layer has
    salt 0: where layers of your own make a model, set ``layer.router.salt`` to another number in each.

    Args:
        num_atoms: M.
        salt: Another one gives other atoms; that of a layer should be its index.

    Raises:
        TypeError: If an argument has another type.
        ValueError: If ``num_atoms`` is below 1.
    """

    def __init__(self, num_atoms: int, *, salt: int = 0) -> None:
        check_types(NgramRouter.__init__, locals())
        check_at_least(1, num_atoms=num_atoms)
        nn.Module.__init__(self)
        self.num_atoms, self.salt, self.init_std = num_atoms, salt, None
        self.register_parameter("bias", None)

    def forward(self, x: Tensor, top_k: int | None = None, **options: Any) -> Selection | Tensor:
        """Select atoms.

        Args:
            x: Codes of n-grams of shape (T, n), from :func:`torchdsc.ops.ngram_codes`.
            top_k: K, a multiple of n.
            **options: As of other routers, which have no bearing here.

        Raises:
            ValueError: If ``top_k`` is not a multiple of n.
        """
        orders = x.shape[-1]
        if top_k is None or top_k % orders:
            raise ValueError(f"top_k must be a multiple of the {orders} orders of n-grams, got {top_k}")
        if orders > self.num_atoms:
            raise ValueError(
                f"num_atoms must be at least {orders}, one for each order of n-grams, got {self.num_atoms}"
            )
        each = top_k // orders
        starts = [order * self.num_atoms // orders for order in range(orders + 1)]
        rows = ngram_rows(x, each, [end - start for start, end in pairwise(starts)], salt=self.salt)
        indices = rows + torch.tensor(starts[:-1], device=x.device).repeat_interleave(each)
        empty = torch.empty(0, dtype=torch.float32, device=x.device)
        logits = torch.zeros(indices.shape, dtype=torch.float32, device=x.device)
        return Selection(logits, indices, empty, empty)

    def deviations(self, init_std: float) -> list[tuple[nn.Parameter, float]]:
        """See :class:`Router`: there are no parameters."""
        return []

    def extra_repr(self) -> str:
        """Sizes, for ``print(model)``."""
        return f"num_atoms={self.num_atoms}, salt={self.salt}"


def set_salt(router: Router, salt: int) -> None:
    """Set the salt of an n-gram router; others have none."""
    if isinstance(router, NgramRouter):
        router.salt = salt
