"""Adaptation of pretrained models: methods against each other at equal budgets and numbers of trials."""

from .config import AdaptConfig, Method, Task, adapt_preset_names, load_adapt_preset
from .study import adapt, write_results

__all__ = ["AdaptConfig", "Method", "Task", "adapt", "adapt_preset_names", "load_adapt_preset", "write_results"]
