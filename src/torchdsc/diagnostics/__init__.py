"""Diagnostics of routed layers: routing, the geometry of a bank, bounds and gradients, and what is wrong with them."""

from typing import TYPE_CHECKING, Any

from .bank import coherence, effective_rank
from .findings import DiagnosticsWarning, Finding, findings, slow_path
from .health import LayerHealth, ModelHealth
from .measure import Diagnostics
from .routing import LayerRouting, RoutingMonitor
from .sensitivity import Sensitivity, sensitivity

if TYPE_CHECKING:
    from .callback import DiagnosticsCallback

__all__ = [
    "Diagnostics",
    "DiagnosticsCallback",
    "DiagnosticsWarning",
    "Finding",
    "LayerHealth",
    "LayerRouting",
    "ModelHealth",
    "RoutingMonitor",
    "Sensitivity",
    "coherence",
    "effective_rank",
    "findings",
    "sensitivity",
    "slow_path",
]


def __getattr__(name: str) -> Any:
    # Only here is transformers needed.
    if name == "DiagnosticsCallback":
        try:
            from .callback import DiagnosticsCallback
        except ImportError as error:
            needs = "torchdsc.diagnostics.DiagnosticsCallback needs transformers: pip install 'torchdsc[models]'"
            raise ImportError(needs) from error
        return DiagnosticsCallback
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
