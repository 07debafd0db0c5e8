import re
import sys

import pytest

from torchdsc.lab.data.hub import load_hub


def test_names_of_parts(monkeypatch):
    monkeypatch.setattr("datasets.load_dataset", lambda *names, split: (*names, split))
    assert load_hub("user/reviews/small:train[:20]") == ("user/reviews", "small", "train[:20]")
    assert load_hub("user/reviews") == ("user/reviews", "train")
    assert load_hub("reviews:test") == ("reviews", "test")


def test_failure(monkeypatch):
    def fail(name, split):
        raise RuntimeError("no route to host")

    monkeypatch.setattr("datasets.load_dataset", fail)
    with pytest.raises(OSError, match=r"^a/b must be files, or a data set .*, got RuntimeError: no route to host$"):
        load_hub("a/b")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=re.escape("need datasets: pip install 'torchdsc[corpora]'")):
        load_hub("a/b")
