"""A quantity over training, or over learning rates, gathered over seeds."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

import numpy as np
import numpy.typing as npt

from torchdsc.lab.tasks.task import Record

Points = Mapping[float, float | None]


@dataclass(frozen=True)
class Series:
    """One quantity of one variant, for every seed.

    Attributes:
        places: Steps or rates at which any seed has a point, ascending, of shape (P,).
        values: Of shape (seeds, P), means over cases; NaN where a seed has no finite value.
    """

    places: npt.NDArray[np.float64]
    values: npt.NDArray[np.float64]

    @classmethod
    def of(cls, by_seed: Sequence[Points]) -> "Series":
        """From the points of each seed."""
        places = sorted(set().union(*by_seed))
        values = [[number(points.get(place)) for place in places] for points in by_seed]
        return cls(np.array(places, dtype=np.float64), np.array(values).reshape(len(by_seed), len(places)))

    @classmethod
    def collect(cls, runs: Iterable[Record], points: Callable[[Record], Points]) -> "Series":
        """From ``points(run)`` of each run: means over cases, at the places that all of them have.

        Seeds that lack a case others have are left out.
        """
        cases: dict[int, list[dict[float, float]]] = {}
        for run in runs:
            found = {place: number(value) for place, value in points(run).items()}
            cases.setdefault(run["seed"], []).append(found)
        whole = max(map(len, cases.values()), default=0)
        return cls.of(
            [
                {place: fmean(case[place] for case in own) for place in set(own[0]).intersection(*own)}
                for own in cases.values()
                if len(own) == whole
            ]
        )

    @property
    def mean(self) -> npt.NDArray[np.float64]:
        """Mean over seeds; NaN where any seed has no value, since a mean over fewer would jump."""
        mean: npt.NDArray[np.float64] = self.values.mean(axis=0)
        return mean

    @property
    def end(self) -> float:
        """The last mean, or where no place has all seeds, the last value there is; NaN for none."""
        for candidates in (self.mean, np.fmin.reduce(self.values, axis=0)):
            finite = candidates[np.isfinite(candidates)]
            if finite.size:
                return float(finite[-1])
        return math.nan

    @property
    def num_points(self) -> int:
        """Number of places at which any seed has a value."""
        return int(np.isfinite(self.values).any(axis=0).sum())

    @property
    def is_complete(self) -> bool:
        """Whether every seed ends with a finite value."""
        return bool(self.values.size and np.isfinite(self.values[:, -1]).all())

    def since(self, place: float) -> "Series":
        """The part from a place on."""
        keep = self.places >= place
        return Series(self.places[keep], self.values[:, keep])


def number(value: float | None) -> float:
    """The value as a float, NaN for None and infinities."""
    return float(value) if value is not None and math.isfinite(value) else math.nan
