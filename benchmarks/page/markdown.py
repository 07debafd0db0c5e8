"""Pieces of Markdown: tables, and figures in words."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from benchmarks.case import Row

# An empty cell.
NONE = "-"


def table(headings: Sequence[str], rows: Iterable[Sequence[str]], *, text_columns: int = 1) -> str:
    """A Markdown table whose columns after the first few are aligned to the right."""
    rule = ["---" if index < text_columns else "---:" for index in range(len(headings))]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (headings, rule, *rows))


def number(value: float) -> str:
    """Three digits, without an exponent."""
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.{2 if value >= 1 else 3}f}" if value < 10 else f"{value:.1f}"


def ms(row: Row, name: str) -> str:
    """Median time of a call."""
    call = row["calls"].get(name)
    return NONE if call is None else number(call["ms"]["median"])


def ratio(row: Row, name: str) -> str:
    """The subject's time over a call's, with quartiles."""
    call = row["calls"].get(name)
    return NONE if call is None else quartiles(call["subject_over_it"])


def quartiles(spread: Mapping[str, float]) -> str:
    """A median with its quartiles in brackets."""
    return f"{spread['median']:.2f} [{spread['q1']:.2f}, {spread['q3']:.2f}]"


def floor_ms(row: Row) -> str:
    """The least time of the subject, in the unit of its times."""
    floor = row.get("floor")
    return NONE if floor is None else number(floor["ms"] / floor["per"])


def achieved(row: Row) -> str:
    """The floor over the subject's time."""
    floor = row.get("floor")
    return NONE if floor is None else f"{floor['achieved']:.0%}"


def mebibytes(value: float) -> str:
    """Bytes in MiB, in whole ones."""
    return f"{value / 2**20:,.0f}"


def fastest(row: Row, prefix: str) -> str | None:
    """The quickest of the calls whose names begin alike."""
    names = [name for name in row["calls"] if name.startswith(prefix)]
    return min(names, key=lambda name: row["calls"][name]["ms"]["median"], default=None)


def left_out(rows: Iterable[Row]) -> str:
    """Reasons why calls are missing, each once; empty where none is."""
    reasons: dict[str, str] = {}
    for row in rows:
        for name, reason in row["left_out"].items():
            reasons.setdefault(name, reason)
    return "".join(f"Left out at some points: {name} ({reason}). " for name, reason in reasons.items()).strip()


def described_hardware(result: Mapping[str, Any]) -> str:
    """Where, with what and when a result was measured."""
    hardware, versions, ceilings = result["hardware"], result["versions"], result["ceilings"]
    threads = f"{hardware['threads']} thread{'s' if hardware['threads'] != 1 else ''}"
    place = hardware["gpu"] if result["device"] == "cuda" else f"{hardware['cpu']}, {threads}"
    copy, product = ceilings["copy_bytes_per_second"] / 1e9, ceilings["product_operations_per_second"] / 1e9
    quick = " A smoke run: its figures mean nothing." if result["quick"] else ""
    return (
        f"*{place}; torch {versions['torch']}, float32; a copy moves {number(copy)} GB/s, a matrix product runs at "
        f"{number(product)} GFLOP/s. Commit {result['commit'][:12]}, {result['date'][:10]}, "
        f"`{result['command']}`.{quick}*"
    )
