"""How an experiment can be made again: commit, versions, hardware, data and settings of its runs."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from torchdsc.lab.tasks.task import Record

from .tables import Table

__all__ = ["provenance_tables"]


def provenance_tables(records: Sequence[Record]) -> list[Table]:
    """Where and with what; the settings of all variants; and those that are a variant's own."""
    made: dict[str, list[str]] = {}
    settings: dict[str, dict[str, list[str]]] = {}
    for record in records:
        facts = {"commit": record["commit"][:12], **{name: record[name] for name in ("versions", "hardware", "data")}}
        for key, value in _flatten(facts).items():
            _add(made.setdefault(key, []), value)
        for key, value in _flatten(record["config"]).items():
            _add(settings.setdefault(key, {}).setdefault(record["variant"], []), value)
    names = list(dict.fromkeys(record["variant"] for record in records))
    # Cases may differ in a setting that all variants have alike.
    shared = [key for key, own in settings.items() if len({frozenset(own.get(name, [])) for name in names}) == 1]
    varying = {
        name: [f"{key} {', '.join(own[name])}" for key, own in settings.items() if key not in shared and name in own]
        for name in names
    }
    head, same = ["what", "value"], [[key, ", ".join(settings[key][names[0]])] for key in shared]
    apart = [[name, "\n".join(own)] for name, own in varying.items()] if any(varying.values()) else []
    tables = [
        Table.of("Where and with what", head, [[key, ", ".join(values)] for key, values in made.items()], "keys"),
        Table.of("Settings of all variants", head, same, "keys"),
        Table.of("Settings by variant", ["Variant", "settings"], apart),
    ]
    return [table for table in tables if table]


def _add(values: list[str], value: str) -> None:
    if value not in values:
        values.append(value)


def _flatten(value: Any, prefix: str = "") -> dict[str, str]:
    """Nested mappings by dotted keys, with values as text."""
    if isinstance(value, Mapping) and value:
        parts = [_flatten(item, f"{prefix}{key}.") for key, item in value.items()]
        return {key: item for part in parts for key, item in part.items()}
    return {prefix.rstrip("."): value if isinstance(value, str) else json.dumps(value, default=str)}
