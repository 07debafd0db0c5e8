"""The layer's sections, as the paper has it and as recommended: ratios of DSC's time to each other layer's."""

from collections.abc import Mapping
from typing import Any

from benchmarks.case import Row

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
        point = row["point"]
        lines.append(
            [
                f"{point['tokens']:,}, {drawing.pass_name(point['kind'])}",
                *(ratio(row, "dense"), ratio(row, "floor"), ms(row, "dsc"), achieved(row)),
                *(fastest_kernel(row, "moe"), ratio(row, "mixture_of_loras"), ratio(row, "published")),
            ]
        )
    headings = [
        *("tokens, pass", "over Dense", "over the floor, timed", "DSC, ms", "floor, computed"),
        *("over the fastest MoE", "over Mixture-of-LoRAs", "over published"),
    ]
    notes = f"DSC's time, and its ratio to the others'. {left_out(result['rows'])}".rstrip()
    return [f"{table(headings, lines)}\n\n{notes}"]


def recommended_tables(result: Mapping[str, Any]) -> list[str]:
    """The recommended layer's time, and its ratio to each other layer's, of MoE's kernels to the fastest one timed."""
    rows = result["rows"]
    lines = [
        [
            f"{row['point']['d']}, {row['point']['tokens']:,}, {drawing.pass_name(row['point']['kind'])}",
            *(ms(row, row["subject"]), ratio(row, "dense")),
            *(fastest_kernel(row, name) for name in ("moe", "moe, one shared")),
            ratio(row, "dsc"),
        ]
        for row in rows
    ]
    headings = ["d, tokens, pass", "ms", "over Dense", "over MoE", "over MoE, one shared", "over the paper's DSC"]
    notes = [f"Instructions that torch uses: {result['instructions']}."] if "instructions" in result else []
    if any("moe" in row["calls"] for row in rows):
        notes.append(
            "auto: MoE ran on the kernel that it takes by itself, on a CPU the eager loop over experts; no other was "
            "timed. At some points grouped_mm is faster, so that these ratios flatter the recommended layer."
        )
    return [f"{table(headings, lines)}\n\n{' '.join([*notes, left_out(rows)])}".rstrip()]


def fastest_kernel(row: Row, name: str) -> str:
    """The ratio to the quickest kernel of an MoE, and which that is; auto where no kernel was asked for."""
    found = name if name in row["calls"] else fastest(row, f"{name} (")
    if found is None:
        return NONE
    return f"{ratio(row, found)} {found.removeprefix(name).strip(' ()') or 'auto'}"


def figures(result: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    """The ratios as dots."""
    description = "DSC's time over each other layer's, at 1, 256 and 4096 tokens, forward and in training"
    return {"layer": (drawing.ratios(result["rows"], label, "layer"), description)}
