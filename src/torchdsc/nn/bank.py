"""The bank of atoms, equation (3)."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from torchdsc.arguments import check_at_least, check_positive, check_types


class BasisBank(nn.Module):
    """M learnable rank-1 atoms ``u_j^T v_j``; one bank may serve several layers.

    The raw rows ``u`` (M, d_in) and ``v`` (M, d_out) are parameters; what is composed are the rows divided by
    ``max(eps, |row|)``, equation (3).

    Args:
        num_atoms: M >= 1.
        in_features: d_in >= 1.
        out_features: d_out; ``in_features`` by default.
        init_norm: Root mean square norm of the raw rows at the start, > 0. Rows of zeros are no way to start:
            equation (3) has slope 1 / eps there.
        sparse_gradients: Give ``u`` and ``v`` row-sparse gradients, of the rows in use alone.
        device: Where the parameters live.
        dtype: Their dtype.

    Raises:
        TypeError: If an argument has another type.
        ValueError: If a size is below 1 or ``init_norm`` is not positive.
    """

    def __init__(
        self,
        num_atoms: int,
        in_features: int,
        out_features: int | None = None,
        *,
        init_norm: float = 0.01,
        sparse_gradients: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_types(BasisBank.__init__, locals())
        out_features = in_features if out_features is None else out_features
        check_at_least(1, num_atoms=num_atoms, in_features=in_features, out_features=out_features)
        check_positive(init_norm=init_norm)
        self.num_atoms, self.in_features, self.out_features = num_atoms, in_features, out_features
        self.init_norm, self.sparse_gradients = init_norm, sparse_gradients
        self.u = nn.Parameter(torch.empty(num_atoms, in_features, device=device, dtype=dtype))
        self.v = nn.Parameter(torch.empty(num_atoms, out_features, device=device, dtype=dtype))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Orthogonal rows (columns where M > d), scaled to the root mean square norm ``init_norm``."""
        for atoms in (self.u, self.v):
            if atoms.is_meta:
                continue
            precise = torch.empty_like(atoms, dtype=torch.promote_types(atoms.dtype, torch.float32))
            _orthogonal(precise)
            rows, columns = atoms.shape
            atoms.copy_(precise * (self.init_norm * math.sqrt(rows / min(rows, columns))))

    def rows(self, indices: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What to compose: atoms of both sides, and where in them ``indices`` point.

        They are the bank itself, or with sparse gradients, in training, copies of the rows in use (at most as many as
        there are indices), through which gradients are sparse.

        Args:
            indices: Atoms, int64 of any shape.

        Returns:
            Rows of shape (n, d_in) and (n, d_out), and int64 of the shape of ``indices``.
        """
        if not self.sparse_gradients or not torch.is_grad_enabled() or not self.u.requires_grad:
            return self.u, self.v, indices
        used, places = torch.unique(indices, return_inverse=True)
        u, v = (functional.embedding(used, atoms, sparse=True) for atoms in (self.u, self.v))
        return u, v, places

    def unit(self, eps: float = 1e-6) -> tuple[Tensor, Tensor]:
        """The atoms of equation (3): two tensors of shape (M, d_in) and (M, d_out), with rows of norm <= 1."""
        return functional.normalize(self.u, dim=1, eps=eps), functional.normalize(self.v, dim=1, eps=eps)

    def extra_repr(self) -> str:
        """Sizes, for ``print(model)``."""
        return f"num_atoms={self.num_atoms}, in_features={self.in_features}, out_features={self.out_features}"


def _orthogonal(out: Tensor) -> None:
    """Fill with a random matrix of orthonormal rows, or columns where there are more rows."""
    rows, columns = out.shape
    if rows <= 16 * columns:
        nn.init.orthogonal_(out)
        return
    # Dividing by the Cholesky factor gives the same distribution as QR, in products: a tall normal matrix is far from
    # singular, and its QR takes minutes at a million rows.
    nn.init.normal_(out)
    factor = torch.linalg.cholesky(out.t() @ out, upper=True)
    identity = torch.eye(columns, dtype=out.dtype, device=out.device)
    out.copy_(out @ torch.linalg.solve_triangular(factor, identity, upper=True))
