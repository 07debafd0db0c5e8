"""The budget solver: widths of each method for a target of total and active parameters."""

from torchdsc.baselines.methods import METHODS

from .api import solve, solve_all
from .plan import Budget, Plan, describe_misses, feed_forward_parameters
from .settings import LayerSettings, solve_settings
from .solvers import TOLERANCE

__all__ = [
    "METHODS",
    "TOLERANCE",
    "Budget",
    "LayerSettings",
    "Plan",
    "describe_misses",
    "feed_forward_parameters",
    "solve",
    "solve_all",
    "solve_settings",
]
