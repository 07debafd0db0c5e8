"""Checks of the types and ranges of arguments of public classes and functions, and arguments by name."""

import copy
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from functools import cache
from math import isfinite
from typing import Any, ClassVar, Literal, Union, Unpack, get_args, get_origin, get_type_hints

__all__ = [
    "check_at_least",
    "check_finite",
    "check_not_negative",
    "check_positive",
    "check_types",
    "named_arguments",
    "own_copies",
]

# Not checked: torch accepts more than their annotations say, and raises its own errors.
_LEFT_TO_TORCH = {"device", "dtype"}
# Characters of a value in an error.
_LONGEST = 200
_NAMES = {int: "an int", float: "a number", bool: "a bool", str: "a str", types.NoneType: "None"}


def check_types(of: Callable[..., Any], values: Mapping[str, Any]) -> None:
    """Refuse values that do not have their annotated types.

    An int is accepted as a float, a tuple as a list; a bool is not accepted as a number.

    Args:
        of: A dataclass, or a function whose parameters are annotated.
        values: Its fields or arguments by name; names without an annotation are ignored.

    Raises:
        TypeError: If a value has another type.
        ValueError: If a value is not one of those that a ``Literal`` lists.
    """
    for name, kind in _hints(of).items():
        if name in values and name not in _LEFT_TO_TORCH and not _fits(values[name], kind):
            has_choices = any(get_origin(part) is Literal for part in _parts(kind))
            error = ValueError if has_choices else TypeError
            raise error(f"{name} must be {_described(kind)}, got {_received(values[name])}")


def check_at_least(least: int, **values: int | None) -> None:
    """Refuse numbers below ``least``; None passes."""
    for name, value in values.items():
        if value is not None and value < least:
            raise ValueError(f"{name} must be >= {least}, got {value}")


def check_positive(**values: float | None) -> None:
    """Refuse numbers that are not finite and above 0; None passes."""
    _check_numbers(values)
    for name, value in values.items():
        if value is not None and not 0 < value < float("inf"):
            raise ValueError(f"{name} must be finite and > 0, got {value}")


def _check_numbers(values: Mapping[str, Any]) -> None:
    for name, value in values.items():
        if isinstance(value, str):
            raise TypeError(f"{name} must be a number, got {value!r}")


def check_not_negative(**values: float | None) -> None:
    """Refuse numbers that are not finite and at least 0; None passes."""
    _check_numbers(values)
    for name, value in values.items():
        if value is not None and not 0 <= value < float("inf"):
            raise ValueError(f"{name} must be finite and >= 0, got {value}")


def check_finite(**values: float) -> None:
    """Refuse infinities and NaN."""
    for name, value in values.items():
        if not isfinite(value):
            raise ValueError(f"{name} must be finite, got {value}")


def own_copies(instance: Any) -> None:
    """Replace lists, dictionaries and sets in a dataclass by copies, so that callers may change theirs afterwards."""
    for field in fields(instance):
        value = getattr(instance, field.name)
        if isinstance(value, list | dict | set):
            # The dataclass may be frozen.
            object.__setattr__(instance, field.name, copy.deepcopy(value))


@cache
def _hints(of: Callable[..., Any]) -> dict[str, Any]:
    hints = get_type_hints(of)
    # **kwargs annotated by Unpack are checked by the function that they are passed on to.
    left = (ClassVar, Unpack)
    return {name: kind for name, kind in hints.items() if name != "return" and get_origin(kind) not in left}


def _parts(kind: Any) -> tuple[Any, ...]:
    return get_args(kind) if get_origin(kind) in (Union, types.UnionType) else (kind,)


def _fits(value: Any, kind: Any) -> bool:
    parts, origin = _parts(kind), get_origin(kind)
    if len(parts) > 1:
        return any(_fits(value, part) for part in parts)
    if kind is Any:
        return True
    if origin is Literal:
        # Not "in": a tensor compares with each element.
        return any(type(value) is type(choice) and value == choice for choice in get_args(kind))
    if kind in (int, float):
        return isinstance(value, int | float if kind is float else int) and not isinstance(value, bool)
    if origin in (list, set, Sequence):
        return isinstance(value, set if origin is set else list | tuple) and all(
            _fits(item, get_args(kind)[0]) for item in value
        )
    if origin is dict:
        key, item = get_args(kind)
        return isinstance(value, dict) and all(_fits(k, key) and _fits(v, item) for k, v in value.items())
    return isinstance(value, kind if origin is None else origin)


def _received(value: Any) -> str:
    """``repr(value)``, but of a tensor its shape, and of what is long the beginning."""
    shape = getattr(value, "shape", None)
    if shape is not None:
        return f"a {type(value).__name__} of shape {tuple(shape)}"
    text = repr(value)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."


def _described(kind: Any) -> str:
    if len(_parts(kind)) > 1:
        return " or ".join(map(_described, _parts(kind)))
    if get_origin(kind) is Literal:
        return f"one of {get_args(kind)}"
    if get_origin(kind) in (list, set, Sequence):
        container, item = "set" if get_origin(kind) is set else "list", get_args(kind)[0]
        return f"a {container} of {getattr(item, '__name__', item)}"
    return _NAMES.get(kind) or f"a {(get_origin(kind) or kind).__name__}"


def named_arguments(names: Sequence[str], args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call by their names; positional ones beyond ``names`` are left out."""
    # torch.compile of torch 2.6 takes no zip of unequal lengths.
    count = min(len(names), len(args))
    return {**dict(zip(names[:count], args[:count], strict=True)), **kwargs}
