"""Scores of a task, in points: higher is better."""

import math

import numpy as np
from numpy.typing import NDArray

from .config import Metric

__all__ = ["score"]

Array = NDArray[np.float64]


def score(metric: Metric, logits: Array, labels: Array) -> float:
    """Score predictions.

    Args:
        metric: "accuracy", "f1", "matthews" or "correlation".
        logits: Shape (n, classes), or (n, 1) for regression.
        labels: Shape (n,).

    Returns:
        100 times the metric; NaN where a prediction is not finite.

    Raises:
        ValueError: If ``metric`` is not one of these.
    """
    if not np.isfinite(logits).all():
        return math.nan
    if metric == "correlation":
        values = logits.reshape(-1)
        return 50 * (_correlation(values, labels) + _correlation(_ranks(values), _ranks(labels)))
    chosen = logits.argmax(-1)
    if metric == "accuracy":
        return 100 * float((chosen == labels).mean())
    true_positive = float(((chosen == 1) & (labels == 1)).sum())
    false_positive = float(((chosen == 1) & (labels != 1)).sum())
    false_negative = float(((chosen != 1) & (labels == 1)).sum())
    true_negative = float(((chosen != 1) & (labels != 1)).sum())
    if metric == "f1":
        missed = false_positive + false_negative
        return 100 * 2 * true_positive / max(1.0, 2 * true_positive + missed)
    if metric == "matthews":
        squared = (
            (true_positive + false_positive)
            * (true_positive + false_negative)
            * (true_negative + false_positive)
            * (true_negative + false_negative)
        )
        # By convention 0 where one class is never chosen, or there is only one.
        difference = true_positive * true_negative - false_positive * false_negative
        return 100 * difference / math.sqrt(squared) if squared else 0.0
    raise ValueError(f"metric must be one of accuracy, f1, matthews and correlation, got {metric!r}")


def _correlation(first: Array, second: Array) -> float:
    """Pearson's, 0 where one of them is constant."""
    first, second = first - first.mean(), second - second.mean()
    norm = float(np.linalg.norm(first) * np.linalg.norm(second))
    return float(first @ second) / norm if norm else 0.0


def _ranks(values: Array) -> Array:
    """Ranks, equal values with the mean of theirs."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    ranks: Array = (last - (counts - 1) / 2)[inverse]
    return ranks
