"""Diagnostics of routed layers: utilisation, load, signal strength, and the geometry of a bank."""

from .bank import coherence, effective_rank
from .routing import LayerRouting, RoutingMonitor

__all__ = ["LayerRouting", "RoutingMonitor", "coherence", "effective_rank"]
