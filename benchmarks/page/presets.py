"""The sections of whole models of presets: ratios of one variant's time to each other's, beside their parameters."""

from collections.abc import Mapping
from typing import Any

from benchmarks.case import Row

from .layers import fastest_kernel
from .markdown import NONE, left_out, ratio, table

_KINDS = {"forward": "forward pass", "training": "training step"}


def tables(result: Mapping[str, Any]) -> list[str]:
    """A row a variant: its parameters, and the subject's time over its own at each point."""
    rows = result["rows"]
    lines = [
        [name, f"{count['stored'] / 1e6:.2f}", f"{count['active'] / 1e6:.3f}", *(_ratio(row, name) for row in rows)]
        for name, count in result["parameters"].items()
    ]
    subject = rows[0]["subject"] if rows else ""
    headings = ["variant", "stored, M", "active, M", *(_title(row) for row in rows)]
    notes = (
        f"Millions of parameters of the whole model, and the time of {subject} over that of the variant; of MoE on the "
        f"fastest of its kernels that was timed, which is named. Instructions that torch uses: "
        f"{result['instructions']}. {left_out(rows)}"
    )
    return [f"{table(headings, lines)}\n\n{notes.rstrip()}"]


def _title(row: Row) -> str:
    point = row["point"]
    return f"{_KINDS[point['kind']]}, {point['batch']} x {point['tokens']}"


def _ratio(row: Row, name: str) -> str:
    if name == row["subject"]:
        return NONE
    return ratio(row, name) if name in row["calls"] else fastest_kernel(row, name)
