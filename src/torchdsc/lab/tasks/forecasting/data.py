"""The series of a run: read, standardised by the training rows, and cut into windows."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from torchdsc.lab.data.rows import read_numbers

from .settings import Settings

__all__ = ["Data", "Split", "Windows", "load_data"]

Split = Literal["train", "valid", "test"]


class Windows(Dataset[dict[str, Tensor]]):
    """Windows of a series: "past_values" of shape (look-back, C) and "labels", the rows after it, (horizon, C).

    Args:
        values: Shape (rows, C).
        starts: First row of each window.
        look_back: Rows that a forecast sees.
        horizon: Rows that it is to say.
    """

    def __init__(self, values: Tensor, starts: list[int], look_back: int, horizon: int) -> None:
        self._values, self._look_back, self._horizon = values, look_back, horizon
        self.starts = starts

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        now = self.starts[index] + self._look_back
        return {
            "past_values": self._values[now - self._look_back : now],
            "labels": self._values[now : now + self._horizon],
        }


@dataclass(frozen=True)
class Data:
    """A standardised series.

    Attributes:
        source: What the settings call it.
        sha256: Of the file.
        columns: Names of the C columns.
        values: Shape (rows, C), float32: less the mean of the column's training rows, over their deviation.
        mean: Of each column's training rows, float64 (C,), in its own unit.
        deviation: Likewise, of the population.
        ends: First row after each part: train, valid and test.
        look_back: Rows that a forecast sees.
        horizon: Rows that it says.
    """

    source: str
    sha256: str
    columns: list[str]
    values: Tensor
    mean: Tensor
    deviation: Tensor
    ends: tuple[int, int, int]
    look_back: int
    horizon: int

    @property
    def hashes(self) -> dict[str, str]:
        """Hash of the file, by what the settings call it."""
        return {self.source: self.sha256}

    @property
    def scales(self) -> dict[str, list[float]]:
        """Mean and deviation that each column was standardised by, by its name."""
        pairs = zip(self.mean.tolist(), self.deviation.tolist(), strict=True)
        return {name: list(pair) for name, pair in zip(self.columns, pairs, strict=True)}

    def windows(self, split: Split, most: int | None = None) -> Windows:
        """The windows of a part, in order: one begins at each row, so that all it forecasts is in the part.

        Args:
            split: The part. A look-back may be in the part before, but for training.
            most: Windows at most, evenly spread; None for all.
        """
        starts = self._starts(split)
        count = min(most or len(starts), len(starts))
        return self._cut([starts[index * len(starts) // count] for index in range(count)])

    def random_windows(self, count: int, seed: int) -> Windows:
        """Windows of the training part in random order: each comes again only after all the others.

        Args:
            count: How many.
            seed: Of the order.
        """
        starts, generator = np.array(self._starts("train")), np.random.default_rng(seed)
        rounds = -(-count // len(starts))
        order = np.concatenate([generator.permutation(starts) for _ in range(rounds)])[:count]
        return self._cut([int(start) for start in order])

    def _starts(self, split: Split) -> range:
        train, valid, test = self.ends
        begin, end = {
            "train": (self.look_back, train),
            "valid": (train, valid),
            "test": (valid, test),
        }[split]
        return range(begin - self.look_back, end - self.look_back - self.horizon + 1)

    def _cut(self, starts: list[int]) -> Windows:
        return Windows(self.values, starts, self.look_back, self.horizon)


def load_data(settings: Settings) -> Data:
    """Read a file, and standardise its columns by their training rows.

    Args:
        settings: Of a run.

    Raises:
        ValueError: If it is no such file, a number is missing or none, there are too few rows, or a column does not
            vary in the training rows.
        OSError: If it cannot be read.
    """
    numbers, sha256 = read_numbers(settings.source, beside=settings.date)
    table = torch.tensor(list(numbers.values()), dtype=torch.float64).T
    train = settings.train_rows
    valid = train + settings.valid_rows
    test = valid + settings.test_rows
    if len(table) < test:
        raise ValueError(
            f"{settings.source} must hold at least train_rows + valid_rows + test_rows = {test:,} rows, "
            f"got {len(table):,}"
        )
    mean, deviation = table[:train].mean(dim=0), table[:train].std(dim=0, correction=0)
    for name, value, column in zip(numbers, deviation.tolist(), table[:train].T, strict=True):
        # Rounding may leave the deviation of equal numbers above zero.
        if value == 0 or bool((column == column[0]).all()):
            raise ValueError(
                f"{settings.source}, column {name!r}, must vary in the first train_rows = {train:,} rows, "
                f"got {column[0].item():g} in all"
            )
    return Data(
        source=settings.source,
        sha256=sha256,
        columns=list(numbers),
        values=((table - mean) / deviation).float().contiguous(),
        mean=mean,
        deviation=deviation,
        ends=(train, valid, test),
        look_back=settings.look_back,
        horizon=settings.horizon,
    )
