"""The section of routing ahead of the blocks: ratios of its time to each other way's, and how often trigrams recur."""

from collections.abc import Mapping
from typing import Any

from .markdown import mebibytes, ms, ratio, table


def tables(result: Mapping[str, Any]) -> list[str]:
    """The ways against each other, and the share of trigrams that have been seen."""
    rows = result["rows"]
    others = list(dict.fromkeys(name for row in rows for name in row["calls"] if name != row["subject"]))
    lines = [
        [
            f"{row['point']['kind']}, {row['point']['batch']} x {row['point']['tokens']:,}",
            ms(row, row["subject"]),
            *(ratio(row, name) for name in others),
        ]
        for row in rows
    ]
    notes = "Milliseconds with routing ahead (in decoding: of one token), and their ratio to those of each other way."
    headings = ["", "ahead, ms", *(f"over {name}" for name in others)]
    written = [f"{table(headings, lines)}\n\n{notes}"]
    if result["trigrams_seen"]:
        lines = [
            [
                *(f"{seen[name]:,}" for name in ("tokens", "before", "stored")),
                mebibytes(seen["stored"] * result["bytes_a_trigram"]),
                f"{seen['share']:.0%}",
            ]
            for seen in result["trigrams_seen"]
        ]
        headings = ["tokens of a text", "training text before it", "its trigrams", "their tables, MiB", "seen"]
        notes = "Share of the trigrams of a text of WikiText-2 (test) that it or the training text before it has held."
        written.append(f"{table(headings, lines, text_columns=0)}\n\n{notes}")
    return written
