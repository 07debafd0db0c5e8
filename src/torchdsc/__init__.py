"""Dynamic Subspace Composition: weights composed, token by token, from a shared bank of unit-norm rank-1 atoms."""

from .bounds import certified_spectral_bound, spectral_norm
from .convert import convert, load_converted
from .losses import Regularization, RegularizedLoss, frame_regularization, last_regularization, regularization
from .nn import DSC, BasisBank, DSCFeedForward, DSCOptions, Residual, Routing, ShortConvolution, recommended
from .optim import build_optimizer, decay_parameter_names, parameter_groups

__version__ = "0.1.0.dev0"

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
]
