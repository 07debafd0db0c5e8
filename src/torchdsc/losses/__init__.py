"""The regularisers, equations (9) to (13): a function for each, and their collection from a model."""

from torchdsc.ops import frame_potential

from .collection import (
    Regularization,
    frame_regularization,
    regularization,
    regularization_of,
    synchronize_regularization,
)
from .host import add_regularization, last_regularization, leave_regularization
from .terms import aux_loss, budget_loss, frame_loss, z_loss
from .trainer import RegularizedLoss

__all__ = [
    "Regularization",
    "RegularizedLoss",
    "add_regularization",
    "aux_loss",
    "budget_loss",
    "frame_loss",
    "frame_potential",
    "frame_regularization",
    "last_regularization",
    "leave_regularization",
    "regularization",
    "regularization_of",
    "synchronize_regularization",
    "z_loss",
]
