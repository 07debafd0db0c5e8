"""A bank whose features are spread over processes: tokens' parts go to the shards, latent values and outputs come back.

What moves for a token is x, y and three numbers an atom, not its 2 K rows of d numbers, nor x to every process that
holds one of its atoms.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from torchdsc.ops import latents
from torchdsc.ops.compose.api import check_shapes

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from .bank import BasisBank


def shard_bank(bank: "BasisBank", mesh: "DeviceMesh") -> None:
    """Spread a bank over processes by features: each keeps d_in / R columns of ``u`` and d_out / R of ``v``.

    ``u`` and ``v`` become DTensors, sharded along dimension 1. Each process calls the layer with tokens of its own, as
    many as it likes, all the same number of times; outputs and gradients are those of the whole bank on all tokens.
    Gradients are averaged over processes, as by ``fully_shard``, which has to leave the bank alone::

        shard_bank(layer.bank, mesh)
        fully_shard(model, mesh=mesh, ignored_params={layer.bank.u, layer.bank.v})

    Forward, d_in + d_out numbers move for a token, and 3 K to each other process (indices, latent values, weights).
    What inspects atoms (``unit``, ``delta_weight``, diagnostics) and L_frame gather the whole bank on every process;
    with ``frame_samples`` L_frame has the rows that are drawn. A process that calls the layer alone, to evaluate or to
    generate, waits for the others. Call this before the optimizer is made: the parameters are new ones.

    Args:
        bank: Of any size, the same on all processes. On the meta device (the bank alone, made under
            ``torch.device("meta")``) it is made here, with normal rows of root mean square norm ``init_norm``, so that
            no process ever has it whole.
        mesh: Of one dimension and all processes.

    Raises:
        TypeError: If an argument has another type.
        ValueError: If the mesh has more dimensions or fewer processes than there are, the bank has row-sparse gradients
            or kept atoms, too few features for so many processes, or is sharded already.
    """
    from torch.distributed import get_world_size
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor, Shard, distribute_tensor

    from .bank import BasisBank

    if not isinstance(bank, BasisBank) or not isinstance(mesh, DeviceMesh):
        raise TypeError(
            f"bank must be a BasisBank and mesh a DeviceMesh, got {type(bank).__name__} and {type(mesh).__name__}"
        )
    if mesh.ndim != 1 or mesh.size() != get_world_size():
        raise ValueError(f"mesh must have one dimension and all {get_world_size()} processes, got {tuple(mesh.shape)}")
    if bank.sparse_gradients:
        raise ValueError(
            "bank must have sparse_gradients = False to be sharded, as a DTensor has no sparse gradient, got True"
        )
    if bank.kept_atoms:
        raise ValueError(f"bank must have no kept atoms to be sharded, got {bank.kept_atoms}")
    for name, columns in (("in_features", bank.in_features), ("out_features", bank.out_features)):
        if _widths(columns, mesh.size())[-1] == 0:
            raise ValueError(f"bank.{name} must leave a column to each of {mesh.size()} processes, got {columns}")
    for name in ("u", "v"):
        atoms = getattr(bank, name)
        if isinstance(atoms, DTensor):
            raise ValueError(f"bank must not be sharded already, got {name} with placements {atoms.placements}")
        if atoms.is_meta:
            shards = normal_shards(atoms, bank.init_norm, mesh)
        else:
            shards = distribute_tensor(atoms.detach(), mesh, [Shard(1)])
        setattr(bank, name, nn.Parameter(shards, requires_grad=atoms.requires_grad))
    bank.mesh = mesh


def normal_shards(atoms: Tensor, norm: float, mesh: "DeviceMesh") -> Tensor:
    """Normal rows of a root mean square norm; each process makes its columns."""
    from torch.distributed.tensor import DTensor, Shard

    (rows, columns), rank = atoms.shape, mesh.get_local_rank()
    part = torch.empty(rows, _widths(columns, mesh.size())[rank], dtype=atoms.dtype, device=mesh.device_type)
    generator = torch.Generator(mesh.device_type).manual_seed(_common_seed(mesh) + rank)
    part.normal_(std=norm / columns**0.5, generator=generator)
    return DTensor.from_local(part, mesh, [Shard(1)], run_check=False, shape=atoms.shape, stride=(columns, 1))


def compose_shards(
    x: Tensor, u: Any, v: Any, indices: Tensor, coefficients: Tensor, eps: float, mesh: "DeviceMesh"
) -> Tensor:
    """Equation (14) for this process's tokens, with the bank's columns on all processes.

    Args:
        x: Tokens of shape (T, d_in); T may differ between processes.
        u: Input atoms (M, d_in), a DTensor sharded along dimension 1.
        v: Output atoms (M, d_out), likewise.
        indices: Selected atoms of shape (T, K), int64.
        coefficients: Their coefficients of shape (T, K), float32 or float64.
        eps: Lower bound of an atom's norm.
        mesh: The processes, each of which must make this call.

    Returns:
        Tensor of shape (T, d_out), in the dtype of ``x``.

    Raises:
        ValueError: If shapes do not fit. The others wait for a process that raises, so this comes before any exchange.
    """
    check_shapes(x, u, v, indices, coefficients)
    step = _Step.of(indices, mesh)
    rows_u, rows_v = step.rows(u), step.rows(v)
    squares = torch.stack([rows.to(coefficients.dtype).square().sum(1) for rows in (rows_u, rows_v)])
    scale_u, scale_v = step.sum(squares).clamp_min(eps * eps).rsqrt()
    places = step.own_places()
    latent = step.to_owners(latents(step.to_shards(x), rows_u, step.places)).to(coefficients.dtype)
    weights = step.gather(coefficients * latent * scale_u[places] * scale_v[places])
    part = functional.embedding_bag(step.places, rows_v.to(weights.dtype), per_sample_weights=weights, mode="sum")
    return step.from_shards(part, v.shape[1]).to(x.dtype)


def latents_shards(x: Tensor, u: Any, indices: Tensor, mesh: "DeviceMesh") -> Tensor:
    """``x_t . u_k`` of raw atoms, of shape (T, K), without gradients; see :func:`compose_shards`."""
    check_shapes(x, u, u, indices, indices)
    with torch.no_grad():
        step = _Step.of(indices, mesh)
        return step.to_owners(latents(step.to_shards(x), step.rows(u), step.places))


def drawn_rows(u: Any, v: Any, samples: int, mesh: "DeviceMesh") -> tuple[Tensor, Tensor]:
    """Whole rows of ``samples`` atoms drawn at random, the same on every process, of shape (samples, d)."""
    generator = torch.Generator().manual_seed(_common_seed(mesh))
    count = u.shape[0]
    if samples < count // 4:
        # Twice as many with repeats: more than enough without.
        some = torch.unique(torch.randint(count, (2 * samples,), generator=generator))
        drawn = some[torch.randperm(len(some), generator=generator)[:samples]].to(mesh.device_type)
    else:
        drawn = torch.randperm(count, generator=generator)[:samples].to(mesh.device_type)
    # As if they were tokens of this process, whose columns of them all others have.
    step = _Step(mesh, [samples] * mesh.size(), drawn, drawn)
    return step.whole_rows(u), step.whole_rows(v)


class _Step(NamedTuple):
    """One call of a bank by all processes: how many tokens each has, and which atoms all of them together use.

    N are the tokens of all processes, ``used`` the atoms that any of them selects, and ``places`` (N, K) where in it a
    token's atoms are.
    """

    mesh: "DeviceMesh"
    tokens: Sequence[int]
    used: Tensor
    places: Tensor

    @classmethod
    def of(cls, indices: Tensor, mesh: "DeviceMesh") -> "_Step":
        empty = indices.new_empty(0)
        here = indices.new_full((mesh.size(),), indices.shape[0])
        step = cls(mesh, [], empty, empty)
        tokens = step.exchange(here, [1] * mesh.size(), [1] * mesh.size()).tolist()
        # A bank of 2^31 atoms fits nowhere.
        everyones = step._replace(tokens=tokens).gather(indices.int())
        used, places = torch.unique(everyones.long(), return_inverse=True)
        return cls(mesh, tokens, used, places)

    @property
    def rank(self) -> int:
        return self.mesh.get_local_rank()

    def own_places(self) -> Tensor:
        """Places of this process's tokens, of shape (T, K)."""
        start = sum(self.tokens[: self.rank])
        return self.places[start : start + self.tokens[self.rank]]

    def rows(self, atoms: Any) -> Tensor:
        """This process's columns of the atoms in use; gradients are averaged over processes."""
        rows = functional.embedding(self.used, atoms.to_local())
        if rows.requires_grad:
            rows.register_hook(lambda grad: grad / self.mesh.size())  # type: ignore[no-untyped-call]
        return rows

    def whole_rows(self, atoms: Any) -> Tensor:
        """All columns of the atoms in use, on every process."""
        rows, count = self.rows(atoms), len(self.used)
        sizes = [count * width for width in _widths(atoms.shape[1], self.mesh.size())]
        received = torch.split(self.to_all(rows, sizes), sizes)
        return torch.cat([part.view(count, -1) for part in received], dim=1)

    def to_shards(self, x: Tensor) -> Tensor:
        """Columns of this process of everyone's tokens, (N, d / R), from this process's tokens (T, d)."""
        widths = _widths(x.shape[1], self.mesh.size())
        parts = torch.cat([part.reshape(-1) for part in torch.split(x, widths, dim=1)])
        sizes = [x.shape[0] * width for width in widths]
        width = widths[self.rank]
        return self.exchange(parts, sizes, [tokens * width for tokens in self.tokens]).view(-1, width)

    def from_shards(self, part: Tensor, columns: int) -> Tensor:
        """This process's tokens (T, d) from everyone's tokens' columns of this process (N, d / R)."""
        widths, here = _widths(columns, self.mesh.size()), self.tokens[self.rank]
        sizes = [here * width for width in widths]
        received = self.exchange(part.reshape(-1), [tokens * part.shape[1] for tokens in self.tokens], sizes)
        pieces = zip(torch.split(received, sizes), widths, strict=True)
        return torch.cat([piece.view(here, width) for piece, width in pieces], dim=1)

    def to_owners(self, part: Tensor) -> Tensor:
        """Sums over shards (T, K) of this process's tokens, from parts (N, K) of everyone's."""
        top_k, here = part.shape[1], self.tokens[self.rank]
        sizes = [here * top_k] * self.mesh.size()
        received = self.exchange(part.reshape(-1), [tokens * top_k for tokens in self.tokens], sizes)
        return received.view(self.mesh.size(), here, top_k).sum(0)

    def gather(self, values: Tensor) -> Tensor:
        """Everyone's (N, K) from this process's (T, K)."""
        top_k = values.shape[1]
        return self.to_all(values, [tokens * top_k for tokens in self.tokens]).view(-1, top_k)

    def sum(self, values: Tensor) -> Tensor:
        """The sum over processes of tensors of one shape: each process sums a piece, and sends it to all."""
        pieces = _widths(values.numel(), self.mesh.size())
        own = [pieces[self.rank]] * self.mesh.size()
        piece = self.exchange(values.reshape(-1), pieces, own).view(self.mesh.size(), -1).sum(0)
        return self.to_all(piece, pieces).view_as(values)

    def to_all(self, values: Tensor, received: list[int]) -> Tensor:
        """What all processes send to each other, from the first process's to the last's, flat."""
        count = self.mesh.size()
        return self.exchange(values.reshape(-1).repeat(count), [values.numel()] * count, received)

    def exchange(self, values: Tensor, sent: list[int], received: list[int]) -> Tensor:
        """Send the first ``sent[0]`` values to the first process and so on; differentiable."""
        from torch.distributed._functional_collectives import all_to_all_single, all_to_all_single_autograd

        send = all_to_all_single_autograd if values.is_floating_point() else all_to_all_single
        exchanged: Tensor = send(values.contiguous(), received, sent, self.mesh)
        return exchanged


def _widths(columns: int, processes: int) -> list[int]:
    """Columns of each process, as DTensor divides them."""
    each = -(-columns // processes)
    return [max(0, min(each, columns - each * rank)) for rank in range(processes)]


def _common_seed(mesh: "DeviceMesh") -> int:
    """A random number that is the first process's on all."""
    from torch.distributed import broadcast, get_global_rank

    group = mesh.get_group()
    seed = torch.randint(2**31, (), device=mesh.device_type)
    broadcast(seed, src=get_global_rank(group, 0), group=group)
    return int(seed)
