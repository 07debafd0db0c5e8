"""The section of adapters: what each takes at inference and in training, as ratios to LoRA."""

from collections.abc import Mapping
from typing import Any

from benchmarks.case import Row

from .markdown import NONE, quartiles, table

_TITLES = {
    "prefill": "prefill of {tokens} tokens",
    "decode": "decoding, batch {batch}",
    "mixed batch": "batch of {batch} with an adapter each",
    "switch": "switch",
    "training": "training step, {batch} x {tokens}",
}


def tables(result: Mapping[str, Any]) -> list[str]:
    """A row for each way to adapt the model: its parameters, and its time over the subject's at each point."""
    rows = result["rows"]
    names = list(dict.fromkeys(name for row in rows for name in row["calls"]))
    lines = [[name, f"{result['parameters'].get(name, 0):,}", *(_ratio(row, name) for row in rows)] for name in names]
    points = [f"{_TITLES[row['point']['kind']].format_map(row['point'])}, over {row['subject']}" for row in rows]
    headings = ["adapter", "parameters", *points]
    return [table(headings, lines)]


def _ratio(row: Row, name: str) -> str:
    """A call's time over the subject's, with quartiles."""
    if name not in row["calls"] or name == row["subject"]:
        return NONE
    found = row["calls"][name]["subject_over_it"]
    return quartiles({"q1": 1 / found["q3"], "median": 1 / found["median"], "q3": 1 / found["q1"]})
