"""Series: their split, what they are standardised by, and their windows."""

import hashlib
from collections import Counter

import pytest
import torch

from torchdsc.lab.tasks.forecasting.data import load_data
from torchdsc.lab.tasks.forecasting.settings import Settings

SMALL = {"train_rows": 6, "valid_rows": 3, "test_rows": 2, "look_back": 2, "horizon": 2, "patch_length": 1, "stride": 1}


def load(path, lines, **changes):
    path.write_text("\n".join(lines) + "\n")
    return load_data(Settings(source=str(path), **{**SMALL, **changes}))


def counting(rows=12, **replaced):
    """Rows of a column that counts, and of one that is ten times its square."""
    lines = [f"day {row},{row},{10 * row * row}" for row in range(rows)]
    for row, line in replaced.items():
        lines[int(row.removeprefix("row"))] = line
    return ["date,count,square", *lines]


class TestByHand:
    @pytest.fixture
    def data(self, tmp_path):
        return load(tmp_path / "a.csv", counting())

    def test_standardised_by_the_training_rows(self, data):
        # 0 .. 5: mean 2.5, variance 35 / 12; ten times 0, 1, 4, 9, 16, 25: mean 550 / 6, mean square 97900 / 6.
        means = [2.5, 550 / 6]
        deviations = [(35 / 12) ** 0.5, (97_900 / 6 - means[1] ** 2) ** 0.5]
        assert data.scales["count"] == pytest.approx([means[0], deviations[0]])
        assert data.scales["square"] == pytest.approx([means[1], deviations[1]])
        for row in (0, 5, 7, 11):
            expected = [(row - means[0]) / deviations[0], (10 * row * row - means[1]) / deviations[1]]
            assert data.values[row].tolist() == pytest.approx(expected, rel=1e-6)
        assert data.values.dtype == torch.float32

    @pytest.mark.parametrize(
        ("split", "expected"),
        [
            # What it sees, and what it says: all of that is in its part.
            ("train", [([0, 1], [2, 3]), ([1, 2], [3, 4]), ([2, 3], [4, 5])]),
            ("valid", [([4, 5], [6, 7]), ([5, 6], [7, 8])]),
            ("test", [([7, 8], [9, 10])]),
        ],
    )
    def test_windows(self, data, split, expected):
        windows = data.windows(split)
        assert len(windows) == len(expected)
        for window, (past, future) in zip((windows[i] for i in range(len(windows))), expected, strict=True):
            assert torch.equal(window["past_values"], data.values[past])
            assert torch.equal(window["labels"], data.values[future])

    def test_hash_and_columns(self, data, tmp_path):
        assert data.hashes == {str(tmp_path / "a.csv"): hashlib.sha256((tmp_path / "a.csv").read_bytes()).hexdigest()}
        assert data.columns == ["count", "square"]


def test_later_rows_change_nothing_of_training(tmp_path):
    data = load(tmp_path / "a.csv", counting())
    other = load(tmp_path / "b.csv", counting(row6="x,900,-1e6", row9="x,-7,1", row10="x,1e9,3", row11="x,0,0"))
    assert torch.equal(data.mean, other.mean)
    assert torch.equal(data.deviation, other.deviation)
    assert torch.equal(data.values[:6], other.values[:6])
    for starts in (data.windows("train").starts, data.random_windows(50, 3).starts):
        assert max(starts) + 2 + 2 == 6
    changed = load(tmp_path / "c.csv", counting(row5="x,6,250"))
    assert not torch.equal(data.mean, changed.mean)


class TestWindows:
    def test_some_are_evenly_spread(self, tiny_data):
        every = tiny_data.windows("valid").starts
        assert every == list(range(240 - 16, 320 - 16 - 4 + 1))
        assert tiny_data.windows("valid", 11).starts == every[::7]
        assert tiny_data.windows("valid", 10**6).starts == every

    def test_random_ones_come_equally_often(self, tiny_data):
        count = len(tiny_data.windows("train"))
        starts = tiny_data.random_windows(2 * count + 5, 1).starts
        assert set(Counter(starts).values()) == {2, 3}
        assert sorted(starts[:count]) == tiny_data.windows("train").starts
        assert starts == tiny_data.random_windows(2 * count + 5, 1).starts
        assert starts != tiny_data.random_windows(2 * count + 5, 2).starts


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (counting(10), r"must hold at least train_rows \+ valid_rows \+ test_rows = 11 rows, got 10"),
        (counting(row8="x,,1"), r"line 10, column 'count', must be a finite number, got ''"),
        (counting(row8="x,1,n/a"), r"line 10, column 'square', must be a finite number, got 'n/a'"),
        (counting(row8="x,1,inf"), r"line 10, column 'square', must be a finite number, got 'inf'"),
        (counting(row8="x,1"), r"line 10, must have 3 fields"),
        (["date", *"abcdefghijkl"], "a column of numbers beside 'date', got none"),
        (["day,x", *(f"{i},{i}" for i in range(12))], r"line 2, must have a column 'date', got \['day', 'x'\]"),
        (
            ["date,x", *(f"{i},{max(i - 4, 1) / 10}" for i in range(12))],
            r"column 'x', must vary in the first train_rows = 6 rows, got 0.1 in all",
        ),
    ],
)
def test_refuses(tmp_path, lines, message):
    with pytest.raises(ValueError, match=rf"a\.csv.*{message}"):
        load(tmp_path / "a.csv", lines)


def test_etth1_has_the_standard_split(shared_data):
    data = load_data(Settings(source=str(shared_data / "timeseries" / "ETTh1.csv")))
    assert data.columns == ["HUFL", "HULL", "MUFL", "MULL", "LUFL", "LULL", "OT"]
    assert [len(data.windows(split)) for split in ("train", "valid", "test")] == [8449, 2785, 2785]
    assert data.ends == (8640, 11520, 14400)
    assert data.scales["OT"] == pytest.approx([17.128, 9.176], abs=1e-3)
