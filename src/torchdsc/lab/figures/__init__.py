"""The figures of a comparison: learning curves, what a loss costs, and the health of the routing.

Each function takes run records and returns a matplotlib `Figure`; `to_svg` makes it part of a page.
"""

try:
    import matplotlib as _matplotlib  # noqa: F401
except ImportError as error:
    raise ImportError("torchdsc.lab.figures needs matplotlib: pip install 'torchdsc[lab]'") from error

from .losses import loss_against_latency, loss_against_parameters, loss_curves
from .routing import gate_history, load_distribution, utilization_history
from .style import PALETTE, to_svg

__all__ = [
    "PALETTE",
    "gate_history",
    "load_distribution",
    "loss_against_latency",
    "loss_against_parameters",
    "loss_curves",
    "to_svg",
    "utilization_history",
]
