"""Scores of a task, in points: higher is better."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from .settings import Metric

__all__ = ["score"]

Array = NDArray[np.float64]


def score(metric: Metric, logits: Array, labels: Array) -> float:
    """Score predictions.

    Args:
        metric: Any but "loss".
        logits: Shape (n, classes), or (n, 1) for regression.
        labels: Shape (n,).

    Returns:
        100 times the metric; NaN where a prediction is not finite.
    """
    if not np.isfinite(logits).all():
        return math.nan
    if metric == "correlation":
        values = logits.reshape(-1)
        return 50 * (_correlation(stats.pearsonr, values, labels) + _correlation(stats.spearmanr, values, labels))
    chosen = logits.argmax(-1)
    if metric == "accuracy":
        return 100 * float((chosen == labels).mean())
    if metric == "f1":
        return 200 * float((chosen * labels).sum()) / max(1.0, float((chosen + labels).sum()))
    # Matthews's, of two classes: the correlation of the vectors of 0 and 1.
    return 100 * _correlation(stats.pearsonr, chosen, labels)


def _correlation(kind: Callable[..., Any], first: Array, second: Array) -> float:
    """By convention 0 where one of them is constant."""
    return 0.0 if min(np.ptp(first), np.ptp(second)) == 0 else float(kind(first, second).statistic)
