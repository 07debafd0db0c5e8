"""Composition of rank-1 atoms, ``y = ((x U_I^T) * z) V_I``, equation (14), by several implementations."""

from .api import compose
from .crossover import IMPLEMENTATIONS, choose_implementation

__all__ = ["IMPLEMENTATIONS", "choose_implementation", "compose"]
