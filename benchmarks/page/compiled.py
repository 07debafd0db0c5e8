"""The section of the compiled functions: ratios of their time to that of what would stand in for them."""

from collections.abc import Mapping
from typing import Any

from benchmarks.case import Row

from .markdown import ms, ratio, table


def tables(result: Mapping[str, Any]) -> list[str]:
    """A table for each kind of processor setting."""
    found = [_table(result["rows"])]
    if "without_avx512" in result:
        found += ["Without AVX-512, on the same processor:", _table(result["without_avx512"])]
    return found


def _table(rows: list[Row]) -> str:
    own = rows[0]["subject"] if rows else ""
    others = list(dict.fromkeys(name for row in rows for name in row["calls"] if name != own))
    lines = []
    for row in rows:
        sizes = dict(row["point"])
        named = f"{sizes.pop('function')}, {sizes.pop('pass')}", str(sizes.pop("threads"))
        listed = ", ".join(f"{name} {size:,}" for name, size in sizes.items())
        lines.append([named[0], listed, named[1], ms(row, own), *(ratio(row, name) for name in others)])
    headings = ["function", "sizes", "threads", "ms", *(f"over {name}" for name in others)]
    return table(headings, lines, text_columns=2)
