"""Tables and figures of operations, routers, memory and whole models; other sections have files of their own."""

from collections.abc import Mapping
from typing import Any

from benchmarks.case import Point, Row
from benchmarks.suite.compose import BASE

from . import figures, layers
from .markdown import NONE, achieved, floor_ms, left_out, mebibytes, ms, number, ratio, table

Result = Mapping[str, Any]
# SVG and what it shows, by name.
Figures = dict[str, tuple[str, str]]


def compose_tables(result: Result) -> list[str]:
    base, rows = BASE, result["rows"]
    corner = {name: max((row["point"][name] for row in rows), default=0) for name in base}

    def shown(point: Point) -> bool:
        return sum(point[name] != value for name, value in base.items()) <= 1 or corner.items() <= point.items()

    implementations = [name for name in ("gather", "triton") if any(name in row["calls"] for row in rows)]
    headings = [
        *("pass", "tokens", "M", "K", "d", "dense", "floor", *implementations, "published"),
        *("auto takes", "auto / published"),
    ]
    lines = [
        [
            *(str(row["point"][name]) for name in ("kind", "tokens", "M", "K", "d")),
            *(ms(row, "dense"), floor_ms(row), *(ms(row, name) for name in implementations), ms(row, "published")),
            *(row["subject"], ratio(row, "published")),
        ]
        for row in sorted(rows, key=lambda row: row["point"]["kind"])
        if shown(row["point"])
    ]
    return _with_reasons(table(headings, lines), rows, "Milliseconds. ")


def compose_figures(result: Result) -> Figures:
    drawn: Figures = {}
    for kind, name in (("forward", "compose-forward"), ("forward+backward", "compose-training")):
        rows = [row for row in result["rows"] if row["point"]["kind"] == kind]
        description = f"compose, {kind}: milliseconds against tokens, M, K and d for each implementation"
        drawn[name] = figures.compose(rows, name), description
    return drawn


def select_tables(result: Result) -> list[str]:
    headings = ["pass", "tokens", "M", "K", "floor", "topk alone", "select", "published", "select / published"]
    lines = [
        [
            *(str(row["point"][name]) for name in ("kind", "tokens", "M", "K")),
            *(floor_ms(row), ms(row, "topk alone"), ms(row, "select"), ms(row, "published"), ratio(row, "published")),
        ]
        for row in sorted(result["rows"], key=lambda row: row["point"]["kind"])
    ]
    return [table(headings, lines) + "\n\nMilliseconds."]


def select_figures(result: Result) -> Figures:
    description = "select, milliseconds against tokens: one pass, the plain formulation, and topk alone"
    return {"select": (figures.select(result["rows"], "select"), description)}


def router_tables(result: Result) -> list[str]:
    beside = [row for row in result["rows"] if "published" in row["calls"]]
    others = ("dense", "linear", "published")
    lines = [
        [
            f"{row['point']['router']}, {figures.pass_name(row['point']['kind'])}",
            f"{row['point']['M']:,}",
            ms(row, row["subject"]),
            *(ratio(row, name) for name in others),
        ]
        for row in beside
    ]
    headings = ["router, pass", "M", "ms", "over Dense", "over the linear router", "over published"]
    first = table(headings, lines) + "\n\nThe layer with its static part of width 327, 4096 tokens."
    lines = [
        [figures.pass_name(row["point"]["kind"]), f"{int(name):,}", ms(row, name), ratio(row, name)]
        for row in result["rows"]
        if row not in beside
        for name in row["calls"]
    ]
    most = max(row["point"]["M"] for row in result["rows"])
    headings = ["pass", "M", "ms", f"M {most:,} over it"]
    return [first, table(headings, lines) + "\n\nProduct keys without a static layer, 4096 tokens, K 4, d 384."]


def router_figures(result: Result) -> Figures:
    rows = [row for row in result["rows"] if "published" not in row["calls"]]
    description = "Milliseconds against the number of atoms with product keys, forward and in training"
    return {"routers": (figures.atoms(rows, "routers"), description)}


def model_tables(result: Result) -> list[str]:
    rows = result["rows"]
    names = list(dict.fromkeys(name for row in rows for name in row["calls"]))
    others = [name for name in names if name not in ("dense", "dsc", "published")]
    columns = ["dense", "floor", "dsc", *others, "published"]
    headings = ["", *(layers.label(name) for name in columns), "floor reached"]
    lines, shares = [], []
    for row in rows:
        title = figures.model_title(row)
        lines.append([title, *(floor_ms(row) if name == "floor" else ms(row, name) for name in columns), achieved(row)])
        shares.append([title, *(ratio(row, name) for name in columns if name not in ("floor", "dsc"))])
    headings_of_shares = ["DSC's time over", *(layers.label(name) for name in columns if name not in ("floor", "dsc"))]
    return [*_with_reasons(table(headings, lines), rows, "Milliseconds. "), table(headings_of_shares, shares)]


def model_figures(result: Result) -> Figures:
    description = "Milliseconds of each model: prefill of 256 tokens at batch 1 and 8, and a new token in generate()"
    return {"model": (figures.models(result["rows"], layers.label, "model"), description)}


def diagnostics_tables(result: Result) -> list[str]:
    lines = [
        [f"{row['point']['model']}, {row['point']['batch']} x {row['point']['tokens']}", ratio(row, "step")]
        for row in result["rows"]
    ]
    return [table(["model", "over the step alone"], lines)]


def memory_tables(result: Result) -> list[str]:
    lines = []
    for row in result["rows"]:
        calls, computed = row["calls"], row["computed"]["published"]["bytes"]
        measured = calls.get("published")
        lines.append(
            [
                *(f"{row['point'][name]:,}" for name in ("tokens", "d", "M", "K")),
                mebibytes(calls["dsc"]["bytes"]),
                f"{(measured or {'bytes': computed})['bytes'] / calls['dsc']['bytes']:.1f}",
                mebibytes(computed),
                NONE if measured is None else mebibytes(measured["bytes"]),
            ]
        )
    headings = ["tokens", "d", "M", "K", "DSC", "published over DSC", "published, computed", "published, measured"]
    tables = _with_reasons(table(headings, lines), result["rows"], "MiB. ")
    if result["rows"]:
        terms = result["rows"][-1]["computed"]["published"]["terms"]
        listed = ", ".join(f"{name} {mebibytes(size)}" for name, size in terms.items())
        tables.append(f"The computed figure of the last row is made up of: {listed} MiB.")
    return tables


def memory_figures(result: Result) -> Figures:
    description = "Peak memory of a training step in GiB: DSC, and the published formulation measured and computed"
    return {"memory": (figures.memory(result["rows"], "memory"), description)}


def crossover_tables(result: Result) -> list[str]:
    lines = [
        [*(str(point[name]) for name in ("tokens", "atoms", "width")), _share(point["ratio"])]
        for point in result["crossovers"]
    ]
    return [table(["tokens", "M", "d", "K / M"], lines, text_columns=0)]


def _share(value: float) -> str:
    return "never" if value > 1 else number(value)


def crossover_figures(result: Result) -> Figures:
    description = "Share K / M from which the masked product is the quicker, against tokens, for M and d"
    return {"crossover": (figures.crossovers(result["crossovers"], "crossover"), description)}


def _with_reasons(text: str, rows: list[Row], lead: str) -> list[str]:
    return [f"{text}\n\n{lead}{left_out(rows)}".rstrip()]
