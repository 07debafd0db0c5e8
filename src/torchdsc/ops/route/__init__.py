"""From tokens to selected atoms: a router's product and the selection in one, so that logits need not be kept."""

from .api import route

__all__ = ["route"]
