"""Dataclasses of the plain values that YAML and JSON hold."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

__all__ = ["from_mapping"]


def from_mapping(kind: Any, name: str, values: Any) -> Any:
    """``kind(**values)``.

    Args:
        kind: A dataclass.
        name: What the values are called in errors.
        values: Its fields.

    Returns:
        The instance.

    Raises:
        ValueError: If a field is unknown or missing.
    """
    if not isinstance(values, Mapping):
        raise ValueError(f"{name} must hold mappings, got {values!r}")
    unknown = sorted(set(values) - {f.name for f in fields(kind)})
    if unknown:
        raise ValueError(f"{name} must set fields of {kind.__name__}, got {unknown}")
    try:
        return kind(**values)
    except TypeError as error:
        raise ValueError(f"{name}: {str(error).removeprefix(f'{kind.__name__}.__init__() ')}") from error
