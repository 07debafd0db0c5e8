"""Dynamic Subspace Composition: weights composed, token by token, from a shared bank of unit-norm rank-1 atoms.

Names are imported when they are first asked for, so that the command line answers without torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .bounds import certified_spectral_bound, spectral_norm
    from .conversion import convert, load_converted
    from .losses import (
        Regularization,
        RegularizedLoss,
        frame_regularization,
        last_regularization,
        regularization,
        synchronize_regularization,
    )
    from .nn import DSC, BasisBank, DSCFeedForward, DSCOptions, Residual, Routing, ShortConvolution, recommended
    from .optim import build_optimizer, decay_parameter_names, parameter_groups

__version__ = "0.1.0"

__all__ = [
    "DSC",
    "BasisBank",
    "DSCFeedForward",
    "DSCOptions",
    "Regularization",
    "RegularizedLoss",
    "Residual",
    "Routing",
    "ShortConvolution",
    "build_optimizer",
    "certified_spectral_bound",
    "convert",
    "decay_parameter_names",
    "frame_regularization",
    "last_regularization",
    "load_converted",
    "parameter_groups",
    "recommended",
    "regularization",
    "spectral_norm",
    "synchronize_regularization",
]

# Where public names are, and what else `import torchdsc` alone gives.
_MODULES = ("nn", "ops", "losses", "bounds", "conversion", "optim")
_OTHERS = ("baselines", "diagnostics", "models", "adapters")


def __getattr__(name: str) -> Any:
    if name in (*_MODULES, *_OTHERS):
        return import_module(f"{__name__}.{name}")
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    for module in map(__getattr__, _MODULES):
        if name in getattr(module, "__all__", ()):
            value = globals()[name] = getattr(module, name)
            return value
    raise AssertionError(f"no module has {name}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_MODULES, *_OTHERS})
