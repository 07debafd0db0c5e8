"""Routing: a router's matrix product and the selection in one operation, so that logits need not be kept."""

from .api import route

__all__ = ["route"]
