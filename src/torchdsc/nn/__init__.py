"""Modules: the bank of atoms, routers and their context, the DSC layer and its residual form."""

from .bank import BasisBank
from .context import CausalContext
from .dsc import DSC, Routing
from .options import DSCOptions
from .residual import DSCResidual
from .routers import LinearRouter, LowRankRouter, ProductKeyRouter, Router
from .statistics import RegularizerWeights, RoutedLayer, forget_statistics
from .statistics_log import RoutingStatistics

__all__ = [
    "DSC",
    "BasisBank",
    "CausalContext",
    "DSCOptions",
    "DSCResidual",
    "LinearRouter",
    "LowRankRouter",
    "ProductKeyRouter",
    "RegularizerWeights",
    "RoutedLayer",
    "Router",
    "Routing",
    "RoutingStatistics",
    "forget_statistics",
]
