"""Modules: the bank of atoms, routers and their context, the DSC layer and its residual form."""

from .bank import BasisBank
from .dsc import DSC, Routing
from .options import DSCOptions
from .residual import Residual
from .routers import LinearRouter, LowRankRouter, ProductKeyRouter, Router
from .short_convolution import ShortConvolution
from .statistics import RegularizerWeights, RoutedLayer, forget_statistics
from .statistics_log import RoutingStatistics

__all__ = [
    "DSC",
    "BasisBank",
    "DSCOptions",
    "LinearRouter",
    "LowRankRouter",
    "ProductKeyRouter",
    "RegularizerWeights",
    "Residual",
    "RoutedLayer",
    "Router",
    "Routing",
    "RoutingStatistics",
    "ShortConvolution",
    "forget_statistics",
]
