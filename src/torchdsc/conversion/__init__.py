"""Conversion of existing models: DSC beside or instead of their feed-forward modules."""

from .api import convert
from .loading import load_converted

__all__ = ["convert", "load_converted"]
