"""Means over seeds and their differences, with the half width of 95 % intervals, also as text."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev, variance

from .tables import DASH, MINUS

__all__ = ["Difference", "format_difference", "format_mean", "paired_difference"]

# Two-sided 95 % points of Student's t, by degrees of freedom; between them the next smaller, which is wider.
_T = {1: 12.71, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262, 10: 2.228}
_T |= {12: 2.179, 15: 2.131, 20: 2.086, 25: 2.060, 30: 2.042, 40: 2.021, 60: 2.000, 120: 1.980}


@dataclass(frozen=True)
class Difference:
    """A mean difference, and the half width of its 95 % interval; None where there is one seed."""

    mean: float
    half_width: float | None


def paired_difference(groups: Mapping[str, Sequence[float]]) -> Difference:
    """Mean over groups (tasks, say) of the mean over seeds of differences that are paired by seed.

    The groups are taken as they are, not as a sample; the seeds of each as a sample, so that the variance of the mean
    is that of each group's mean added up.

    Args:
        groups: Differences by group, one a seed.

    Returns:
        The difference; NaN without any.
    """
    if not groups:
        return Difference(math.nan, None)
    mean = fmean(fmean(values) for values in groups.values())
    if any(len(values) < 2 for values in groups.values()):
        return Difference(mean, None)
    parts = [(variance(values) / len(values), len(values) - 1) for values in groups.values()]
    total = sum(part for part, _ in parts)
    if total == 0:
        return Difference(mean, 0.0)
    # Welch and Satterthwaite: groups vary by different amounts.
    freedom = total**2 / sum(part**2 / degrees for part, degrees in parts)
    point = _T[max((known for known in _T if known <= freedom + 1e-9), default=1)]
    return Difference(mean, point * math.sqrt(total) / len(groups))


def format_mean(values: Sequence[float], decimals: int) -> str:
    """ "71.20 ± 0.84", the sample standard deviation over seeds; without it for one seed, a dash for none.

    Values that are not finite, of runs that diverged, are left out, and the text says how many.
    """
    if not values:
        return DASH
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return "NaN"
    text = f"{fmean(finite):.{decimals}f}" + (f" ± {stdev(finite):.{decimals}f}" if len(finite) > 1 else "")
    return text if len(finite) == len(values) else f"{text} ({len(finite)} of {len(values)} finite)"


def format_difference(value: Difference | None, decimals: int) -> str:
    """ "+0.41 ± 0.55" with the half width of the 95 % interval; a dash for None, "NaN" where a run diverged."""
    if value is None:
        return DASH
    if not math.isfinite(value.mean):
        return "NaN"
    text = f"{value.mean:+.{decimals}f}".replace("-", MINUS)
    return text if value.half_width is None else f"{text} ± {value.half_width:.{decimals}f}"
