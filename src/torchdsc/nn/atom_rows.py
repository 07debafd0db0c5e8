"""Parameters with a row for each atom, some of which may be kept as they are."""

from typing import ClassVar

import torch
from torch import Tensor, nn

from .sharding import whole

# Of the size of a row: how far the copy of an atom starts from it.
_NOISE = 0.1


class AtomRows(nn.Module):
    """Base class of modules that have a row for each atom.

    Rows that training must not change are parameters of their own without gradients, "kept_u" beside "u". So no
    optimizer moves them, not even by its weight decay or momentum, and it spends no memory on them. They are the first
    atoms.

    Attributes:
        atom_parameters: Names of the parameters with rows of atoms.
        num_atoms: M, kept ones among them.
        kept_atoms: How many are kept.
    """

    atom_parameters: ClassVar[tuple[str, ...]]
    num_atoms: int
    kept_atoms: int = 0

    def all_rows(self, name: str) -> Tensor:
        """The rows of all atoms (M, ...), of parameter ``name``."""
        own = whole(getattr(self, name))
        return torch.cat([whole(getattr(self, f"kept_{name}")), own]) if self.kept_atoms else own

    @torch.no_grad()
    def arrange(self, atoms: Tensor, kept: int, copies: int = 0) -> None:
        """Choose and order the atoms. The parameters are new ones, which no optimizer made before knows.

        Args:
            atoms: Indices of the atoms that there are from now on, of shape (n,), int64.
            kept: How many of them, the first, are kept from now on; less than n.
            copies: How many, the last, are new: copies with some noise.
        """
        for name in self.atom_parameters:
            if getattr(self, name, None) is None:
                continue
            rows = self.all_rows(name).detach()[atoms]
            new = rows[len(rows) - copies :]
            # A bias is one number a row.
            size = new.norm(dim=-1, keepdim=True) / new.shape[-1] ** 0.5 if new.dim() > 1 else new.abs()
            new += _NOISE * size * torch.randn_like(new)
            is_trained = getattr(self, name).requires_grad
            setattr(self, name, nn.Parameter(rows[kept:].clone(), is_trained))
            self.register_parameter(f"kept_{name}", nn.Parameter(rows[:kept].clone(), requires_grad=False))
            if not kept:
                delattr(self, f"kept_{name}")
        self.num_atoms, self.kept_atoms = len(atoms), kept
