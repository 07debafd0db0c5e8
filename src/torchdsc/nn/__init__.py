"""Modules: the bank of atoms, routers, short convolutions, the DSC layer, and feed-forward layers with it."""

from .bank import BasisBank
from .bank_shards import shard_bank
from .context import Contextual, Seen
from .context_options import ContextOptions
from .dense import DenseFFN
from .dsc import DSC
from .feed_forward import DSCFeedForward
from .gated import GatedFFN
from .options import DSCOptions
from .recommended import recommended
from .regularizers import RegularizerWeights
from .residual import Residual
from .routers import LinearRouter, LowRankRouter, NgramRouter, ProductKeyRouter, Router
from .routing import Routing
from .rows_on_disk import leave_on_disk
from .short_convolution import ShortConvolution
from .statistics import RoutedLayer, forget_statistics
from .statistics_log import RoutingStatistics

__all__ = [
    "DSC",
    "BasisBank",
    "ContextOptions",
    "Contextual",
    "DSCFeedForward",
    "DSCOptions",
    "DenseFFN",
    "GatedFFN",
    "LinearRouter",
    "LowRankRouter",
    "NgramRouter",
    "ProductKeyRouter",
    "RegularizerWeights",
    "Residual",
    "RoutedLayer",
    "Router",
    "Routing",
    "RoutingStatistics",
    "Seen",
    "ShortConvolution",
    "forget_statistics",
    "leave_on_disk",
    "recommended",
    "shard_bank",
]
