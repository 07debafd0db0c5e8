"""The mathematics as functions: composing atoms, gating scores, selecting them. Imports torch only."""

from .compose import compose
from .gate import gate
from .select import select

__all__ = ["compose", "gate", "select"]
