"""Results on the terminal: a heading for each point, and a line a call."""

from typing import Any

from .case import ordered
from .runner import describe

MEBIBYTE = 2**20


def result_lines(result: dict[str, Any]) -> list[str]:
    """Every call of every point: time or memory, the subject's share of it, and what memory it took."""
    lines = [f"{result['benchmark']}: {result['description']}"]
    for row in result["rows"]:
        found = {name: _call(row, call) for name, call in row["calls"].items()}
        if "floor" in row:
            # A benchmark that times its floor as a call has both in one line.
            found["floor"] = f"{found.get('floor', '')}{_floor(row)}"
        for name, computed in row.get("computed", {}).items():
            found[name] = f"{found.get(name, '')}  computed {amount(computed['bytes'], 'bytes')}"
        found |= {name: f"  left out: {reason}" for name, reason in row["left_out"].items() if name not in found}
        lines += _point(row, found, f"{row['subject']} / it")
    return lines


def comparison_lines(result: dict[str, Any]) -> list[str]:
    """The ratio current / base of every call."""
    lines = [f"{result['benchmark']}: {result['commit'][:12]} against {result['base']['ref']}"]
    for row in result["rows"]:
        found = {
            name: f"{amount(call['current'], row['unit']):>14}{amount(call['base'], row['unit']):>14}  "
            + _quartiles(call["current_over_base"])
            for name, call in row["calls"].items()
        }
        found |= {name: f"  missing in the base: {reason}" for name, reason in row["missing"].items()}
        lines += _point(row, found, "current, base, current / base")
    return lines


def amount(value: float, unit: str) -> str:
    """A time or a size in words."""
    if unit == "bytes":
        return f"{value / MEBIBYTE:,.0f} MiB"
    number = f"{value:.3g}" if value < 100 else f"{value:,.0f}"
    return f"{number} {unit.split()[0]}"


def _point(row: dict[str, Any], found: dict[str, str], heading: str) -> list[str]:
    unit = row["unit"]
    return [
        "",
        f"  {describe(row['point'])}   ({unit}; {heading})",
        *(f"    {n:<18}{found[n]}" for n in ordered(found)),
    ]


def _call(row: dict[str, Any], call: dict[str, Any]) -> str:
    if "bytes" in call:
        return f"{amount(call['bytes'], 'bytes'):>14}  {call['subject_over_it']:.2f}"
    ms, extra = call["ms"], call["extra_bytes"]
    taken = "" if extra is None else f"   {extra / MEBIBYTE:,.1f} MiB"
    spread = f"[{ms['q1']:.4g} .. {ms['q3']:.4g}]"
    return f"{amount(ms['median'], row['unit']):>14} {spread:<20} {_quartiles(call['subject_over_it'])}{taken}"


def _floor(row: dict[str, Any]) -> str:
    floor = row["floor"]
    least = amount(floor["ms"] / floor["per"], row["unit"])
    return f"{least:>14} at least: {row['subject']} reaches {floor['achieved']:.0%} of it"


def _quartiles(ratio: dict[str, float]) -> str:
    return f"{ratio['median']:.2f} [{ratio['q1']:.2f} .. {ratio['q3']:.2f}]"
