"""The one rule of decision: differences, paired by seed where seeds are shared, with 95 % intervals."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median, stdev, variance

from scipy import stats

__all__ = ["DASH", "Interval", "format_interval", "format_mean", "mean_difference", "median_ratio"]

DASH, MINUS, TIMES = "\N{EN DASH}", "\N{MINUS SIGN}", "\N{MULTIPLICATION SIGN}"
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Interval:
    """A figure, and the ends of its 95 % interval; these are None where one seed tells nothing of it."""

    mean: float
    low: float | None = None
    high: float | None = None

    @property
    def half_width(self) -> float | None:
        """Half of the interval's width."""
        return None if self.low is None or self.high is None else (self.high - self.low) / 2

    @property
    def is_decided(self) -> bool:
        """Whether the interval leaves zero out."""
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)


def mean_difference(own: Mapping[str, Mapping[int, float]], other: Mapping[str, Mapping[int, float]]) -> Interval:
    """Mean over cases of the difference of means over seeds, with its interval.

    The cases are taken as they are, not as a sample; the seeds of each as a sample. Where both have a seed in a case,
    differences are paired by it; where they share none, the two are independent samples (Welch).

    Args:
        own: Figures by case and seed.
        other: Those it is compared to.

    Returns:
        The difference, NaN without a common case or where a figure is not finite; without an interval where a case has
        one difference alone.
    """
    means: list[float] = []
    # Of each mean: its variance, and the degrees of freedom of that.
    parts: list[tuple[float, int]] = []
    is_known = True
    for case in own.keys() & other.keys():
        shared = sorted(own[case].keys() & other[case].keys())
        pairs = [own[case][seed] - other[case][seed] for seed in shared]
        samples = [pairs] if shared else [list(own[case].values()), list(other[case].values())]
        means.append(fmean(samples[0]) - (0.0 if shared else fmean(samples[1])))
        is_known &= all(len(sample) > 1 for sample in samples)
        parts += [(variance(sample) / len(sample), len(sample) - 1) for sample in samples if len(sample) > 1]
    if not means or not all(map(math.isfinite, means)):
        return Interval(math.nan)
    mean = fmean(means)
    if not is_known:
        return Interval(mean)
    total = sum(part for part, _ in parts)
    if total == 0:
        return Interval(mean, mean, mean)
    # Welch and Satterthwaite: samples vary by different amounts.
    freedom = total**2 / sum(part**2 / degrees for part, degrees in parts)
    half = float(stats.t.ppf((1 + CONFIDENCE) / 2, freedom)) * math.sqrt(total) / len(means)
    return Interval(mean, mean - half, mean + half)


def median_ratio(own: Sequence[float], other: Sequence[float]) -> Interval:
    """Median of ratios of samples that belong together, with an interval that assumes no distribution."""
    ratios = [first / second for first, second in zip(own, other, strict=True)]
    interval = stats.quantile_test(ratios, q=1.0, p=0.5).confidence_interval(CONFIDENCE)
    low, high = float(interval.low), float(interval.high)
    found = median(ratios)
    return Interval(found, low, high) if math.isfinite(low) and math.isfinite(high) else Interval(found)


def format_mean(values: Sequence[float], decimals: int) -> str:
    """ "4.230 ± 0.010", the sample deviation over seeds; without it for one seed, a dash for none.

    Values that are not finite, of runs that diverged, are left out, and the text says how many.
    """
    if not values:
        return DASH
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return "NaN"
    text = f"{fmean(finite):.{decimals}f}".replace("-", MINUS)
    text += f" ± {stdev(finite):.{decimals}f}" if len(finite) > 1 else ""
    return text if len(finite) == len(values) else f"{text} ({len(finite)} of {len(values)} finite)"


def format_interval(value: Interval | None, decimals: int) -> str:
    """ "+0.41 ± 0.55" with the half width of the 95 % interval; a dash for None, "NaN" where a run diverged."""
    if value is None:
        return DASH
    if not math.isfinite(value.mean):
        return "NaN"
    text = f"{value.mean:+.{decimals}f}".replace("-", MINUS)
    return text if value.half_width is None else f"{text} ± {value.half_width:.{decimals}f}"
