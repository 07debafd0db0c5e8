"""Means over seeds in words, where runs diverged."""

import math

import pytest

from torchdsc.lab.intervals import Difference, format_difference, format_mean


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ([1.0, 3.0], "2.00 ± 1.41"),
        ([1.0, math.nan, 3.0], "2.00 ± 1.41 (2 of 3 finite)"),
        ([math.inf, 3.0], "3.00 (1 of 2 finite)"),
        ([math.nan], "NaN"),
    ],
)
def test_mean(values, text):
    assert format_mean(values, 2) == text


def test_difference():
    assert format_difference(Difference(math.nan, math.nan), 2) == "NaN"
    assert format_difference(Difference(0.5, 0.25), 2) == "+0.50 ± 0.25"
