"""The section of traffic: bytes a token as the layer grows, and the time of its forward pass."""

from collections.abc import Mapping
from typing import Any

from .markdown import ms, ratio, table


def tables(result: Mapping[str, Any]) -> list[str]:
    """A row for each size, number of tokens and router."""
    rows = {(row["point"]["d"], row["point"]["tokens"]): row for row in result["rows"]}
    lines = []
    for point in sorted(result["counted"], key=lambda point: point["tokens"]):
        row, tokens = rows[point["d"], point["tokens"]], point["tokens"]
        read = point["router_bytes"] + point["atom_bytes"]
        lines.append(
            [
                *(f"{tokens:,}", str(point["d"]), f"{point['M']:,}", point["router"].replace("_", " ")),
                *(f"{point[name] / tokens:,.0f}" for name in ("router_bytes", "atom_bytes")),
                f"{point['router_bytes'] / read:.1%}",
                ms(row, point["router"]),
                ratio(row, point["router"]),
            ]
        )
    headings = ["tokens", "d", "M", "router", "of the router", "of the atoms", "router's share", "ms", "linear over it"]
    return [f"{table(headings, lines)}\n\nBytes a token, and milliseconds of the forward pass."]
