"""Adaptation of pretrained models: methods against each other at equal budgets and numbers of trials."""

from .config import AdaptConfig, Method, Task

__all__ = ["AdaptConfig", "Method", "Task"]
