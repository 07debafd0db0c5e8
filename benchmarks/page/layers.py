"""The layer's section: ratios of DSC's time to each other layer's."""

from collections.abc import Mapping
from typing import Any

from . import figures as drawing
from .markdown import NONE, achieved, fastest, left_out, ms, ratio, table

LABELS = {
    "dense": "Dense",
    "floor": "floor",
    "dsc": "DSC",
    "mixture_of_loras": "Mixture-of-LoRAs",
    "published": "published",
}


def label(name: str) -> str:
    """A layer's name as the page writes it."""
    return LABELS.get(name, name.replace("moe", "MoE"))


def tables(result: Mapping[str, Any]) -> list[str]:
    """DSC's time, and its ratio to each other layer's."""
    lines = []
    for row in result["rows"]:
        point, moe = row["point"], fastest(row, "moe")
        moe_cell = NONE if moe is None else f"{ratio(row, moe)} {moe.partition('(')[2].rstrip(')')}"
        lines.append(
            [
                f"{point['tokens']:,}, {drawing.pass_name(point['kind'])}",
                *(ratio(row, "dense"), ratio(row, "floor"), ms(row, "dsc"), achieved(row)),
                *(moe_cell, ratio(row, "mixture_of_loras"), ratio(row, "published")),
            ]
        )
    headings = [
        *("tokens, pass", "over Dense", "over the floor, timed", "DSC, ms", "floor, computed"),
        *("over the fastest MoE", "over Mixture-of-LoRAs", "over published"),
    ]
    notes = f"DSC's time, and its ratio to the others'. {left_out(result['rows'])}".rstrip()
    return [f"{table(headings, lines)}\n\n{notes}"]


def figures(result: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    """The ratios as dots."""
    description = "DSC's time over each other layer's, at 1, 256 and 4096 tokens, forward and in training"
    return {"layer": (drawing.ratios(result["rows"], label, "layer"), description)}
