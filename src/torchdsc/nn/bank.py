"""The bank of atoms, equation (3)."""

import math
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from torchdsc.arguments import check_at_least, check_positive, check_types
from torchdsc.ops import compose, frame_potential, latents
from torchdsc.ops.compose.api import Implementation

from .atom_rows import AtomRows
from .bank_shards import compose_shards, drawn_rows, latents_shards, normal_shards
from .sharding import check_not_flattened, is_sharded, whole

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


class FrameEstimate(NamedTuple):
    """How a bank computes L_frame; the arguments of :func:`torchdsc.losses.frame_loss`."""

    normalized: bool = False
    samples: int | None = None


class BasisBank(AtomRows):
    """M learnable rank-1 atoms ``u_j^T v_j``; one bank may serve several layers.

    The raw rows ``u`` (M, d_in) and ``v`` (M, d_out) are parameters; what is composed are the rows divided by
    ``max(eps, |row|)``, equation (3).

    Args:
        num_atoms: M >= 1.
        in_features: d_in >= 1.
        out_features: d_out; ``in_features`` by default.
        init_norm: Root mean square norm of the raw rows at the start, > 0. Rows cannot start at zero, where equation
            (3) has slope 1 / eps.
        sparse_gradients: Give ``u`` and ``v`` row-sparse gradients, which hold only the rows in use.
        device: Where the parameters live.
        dtype: Their dtype.

    Attributes:
        origin: What each atom was added for, as an index, int64 of shape (M,); None where all are of one kind.
        is_lent: Whether adapters other than its own use it, so that it stays as it is.
        asks_ahead: Whether the system is asked for rows on disk once they are known, after :func:`leave_on_disk`.
        mesh: Processes that its features are spread over by :func:`shard_bank`; None where it is whole.

    Raises:
        TypeError: If an argument has another type.
        ValueError: If a size is below 1 or ``init_norm`` is not positive.
    """

    # Parameters of which a token uses few rows: torchdsc.parameter_groups gives them a learning rate of their own.
    row_parameters = atom_parameters = ("u", "v")
    origin: Tensor | None
    is_lent = asks_ahead = False
    mesh: "DeviceMesh | None" = None

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
        self.register_buffer("origin", None)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Orthogonal rows (columns where M > d), scaled to the root mean square norm ``init_norm``.

        Of a bank over several processes normal rows of that norm.
        """
        for atoms in (self.u, self.v):
            if atoms.is_meta:
                continue
            if self.mesh is not None:
                atoms.copy_(normal_shards(atoms, self.init_norm, self.mesh))
                continue
            precise = torch.empty_like(atoms, dtype=torch.promote_types(atoms.dtype, torch.float32))
            _orthogonal(precise)
            rows, columns = atoms.shape
            atoms.copy_(precise * (self.init_norm * math.sqrt(rows / min(rows, columns))))

    def forward(
        self,
        x: Tensor | None,
        indices: Tensor | None = None,
        coefficients: Tensor | None = None,
        *,
        eps: float = 1e-6,
        impl: Implementation = "auto",
        frame: FrameEstimate | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Compose, inspect or regularise the atoms; the arguments given choose which, see Returns.

        Call the bank instead of reading ``u`` and ``v``: parameters that are offloaded, sharded or parametrized are
        whole only inside this call.

        Args:
            x: Tokens of shape (T, d_in); None for the atoms or L_frame.
            indices: Selected atoms of shape (T, K), int64; without ``x`` of any shape (...), all M by default.
            coefficients: Their coefficients z of shape (T, K).
            eps: Lower bound of an atom's norm.
            impl: Implementation of the composition; a bank over several processes has one of its own.
            frame: Ask for L_frame, computed like this.

        Returns:
            Depending on the arguments given:

            * ``x``, ``indices`` and ``coefficients``: the composed outputs, of shape (T, d_out);
            * ``x`` and ``indices``: the latent values ``x . u_k`` of raw atoms, of shape (T, K), without gradients;
            * ``frame``: L_frame, equation (11), a scalar;
            * otherwise the unit atoms of equation (3), of shape (..., d_in) and (..., d_out).

        Raises:
            ValueError: If shapes do not fit.
            TypeError: If the dtype of ``x`` is not that of the bank. A bank over several processes takes any.
            RuntimeError: If the rows are a part of a flattened parameter of FSDP1.
        """
        if self.mesh is not None and x is not None:
            assert indices is not None
            if coefficients is None:
                return latents_shards(x, self.u, indices, self.mesh)
            return compose_shards(x, self.u, self.v, indices, coefficients, eps, self.mesh)
        if self.mesh is not None and frame is not None and frame.samples is not None:
            rows_u, rows_v = drawn_rows(self.u, self.v, min(frame.samples, self.num_atoms), self.mesh)
            return self._frame_term(rows_u, rows_v, frame, eps)
        u, v = whole(self.u), whole(self.v)
        if frame is not None or u.dim() != 2:
            check_not_flattened("bank.u", u, (self.num_atoms - self.kept_atoms, self.in_features))
            check_not_flattened("bank.v", v, (self.num_atoms - self.kept_atoms, self.out_features))
        if self.kept_atoms:
            u, v = self.all_rows("u"), self.all_rows("v")
        if frame is not None:
            return self._frame_loss(u, v, frame, eps)
        if x is None:
            if indices is not None:
                u, v = u[indices], v[indices]
            return functional.normalize(u, dim=-1, eps=eps), functional.normalize(v, dim=-1, eps=eps)
        assert indices is not None
        if u.dtype != x.dtype and is_sharded(self.u):
            # Gathered from another FSDP unit, which this unit's mixed precision does not cast.
            u, v = u.to(x.dtype), v.to(x.dtype)
        if coefficients is None:
            return latents(x.detach(), u.detach(), indices)
        u, v, indices = self._in_use(u, v, indices)
        return compose(x, u, v, indices, coefficients, eps=eps, impl=impl)

    def _frame_loss(self, u: Tensor, v: Tensor, frame: FrameEstimate, eps: float) -> Tensor:
        samples = frame.samples
        if samples is not None and (samples < self.num_atoms or self.sparse_gradients):
            drawn = torch.randperm(self.num_atoms, device=u.device)[: min(samples, self.num_atoms)]
            sampled = self._in_use(u, v, drawn)[:2]
            u, v = (u[drawn], v[drawn]) if sampled[0] is u else sampled
        return self._frame_term(u, v, frame, eps)

    def _frame_term(self, u: Tensor, v: Tensor, frame: FrameEstimate, eps: float) -> Tensor:
        """L_frame of all atoms, estimated by those given."""
        pairs, samples = self.num_atoms * (self.num_atoms - 1), u.shape[0]
        scale = 1.0 if samples == self.num_atoms else pairs / max(1, samples * (samples - 1))
        total = (frame_potential(u, eps) + frame_potential(v, eps)) * scale
        return total / max(1, pairs) if frame.normalized else total

    def _in_use(self, u: Tensor, v: Tensor, indices: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Atoms u and v, and ``indices`` (int64, any shape) into them.

        Without sparse gradients these are the arguments. With them, in training, u and v are copies of the rows in use,
        through which gradients are sparse, and indices count in the copies.
        """
        if not self.sparse_gradients or not torch.is_grad_enabled() or not u.requires_grad:
            return u, v, indices
        used, places = torch.unique(indices, return_inverse=True)
        return functional.embedding(used, u, sparse=True), functional.embedding(used, v, sparse=True), places

    def unit(self, eps: float = 1e-6) -> tuple[Tensor, Tensor]:
        """The atoms of equation (3): two tensors of shape (M, d_in) and (M, d_out), with rows of norm <= 1."""
        u, v = self(None, eps=eps)
        return u, v

    def extra_repr(self) -> str:
        """Sizes, for ``print(model)``."""
        return f"num_atoms={self.num_atoms}, in_features={self.in_features}, out_features={self.out_features}"


def _orthogonal(out: Tensor) -> None:
    """Fill with a random matrix of orthonormal rows, or columns where there are more rows."""
    rows, columns = out.shape
    if rows <= 16 * columns:
        nn.init.orthogonal_(out)
        return
    # Dividing by the Cholesky factor gives the same distribution as QR, which takes minutes at a million rows. A tall
    # normal matrix is far from singular.
    nn.init.normal_(out)
    factor = torch.linalg.cholesky(out.t() @ out, upper=True)
    identity = torch.eye(columns, dtype=out.dtype, device=out.device)
    out.copy_(out @ torch.linalg.solve_triangular(factor, identity, upper=True))
