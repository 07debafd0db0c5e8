"""Settings from YAML, checked against the types of dataclasses; errors are a line: field, expected and received."""

import json
import re
from collections.abc import Hashable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args, get_type_hints

import yaml
from pydantic import AfterValidator, ConfigDict, Field, TypeAdapter, ValidationError

__all__ = [
    "STRICT",
    "Count",
    "Name",
    "Rate",
    "Seed",
    "SettingsError",
    "Unique",
    "build",
    "check_fields",
    "naming",
    "parse_yaml",
    "read_yaml",
    "shorten",
]

# Of dataclasses of settings: 2.5 is no int, "no" is no bool, and an unknown field is an error.
STRICT = ConfigDict(strict=True, extra="forbid")

Name = Annotated[str, Field(min_length=1)]
Count = Annotated[int, Field(ge=1)]
Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]
# As numpy takes them.
Seed = Annotated[int, Field(ge=0, lt=2**32)]

# In words that fit YAML, where pydantic's are those of JSON.
_EXPECTED = {
    "int_type": "be an integer",
    "float_type": "be a number",
    "bool_type": "be true or false",
    "string_type": "be text",
    "list_type": "be a list",
    "set_type": "be a list",
    "dict_type": "be a mapping",
    "dataclass_type": "be a mapping",
}
_Kind = TypeVar("_Kind")
_Loc = tuple[int | str, ...]


class SettingsError(ValueError):
    """A setting that is unknown, missing, of another type, or out of its range."""


@contextmanager
def naming(source: object) -> Iterator[None]:
    """Errors of settings inside name the ``source`` they come from; None leaves them as they are."""
    try:
        yield
    except SettingsError as error:
        if source is None:
            raise
        raise SettingsError(f"{source}: {error}") from error


def _all_different(values: list[Any]) -> list[Any]:
    if len(set(values)) != len(values):
        raise ValueError(f"must be different values, got {shorten(values)}")
    return values


# Of a list: no value twice.
Unique = AfterValidator(_all_different)


def read_yaml(file: Path) -> dict[str, Any]:
    """The settings that a YAML file holds, by name.

    Raises:
        SettingsError: If it is no YAML, or holds something else; names the file.
        OSError: If it cannot be read.
    """
    values = parse_yaml(file.read_bytes(), str(file))
    if not isinstance(values, dict):
        raise SettingsError(f"{file} must hold settings by name, got {shorten(values)}")
    return values


def parse_yaml(text: str | bytes, source: str) -> Any:
    """The one value of a YAML document of plain types.

    Args:
        text: The document.
        source: What it is called in errors.

    Raises:
        SettingsError: If it is no such document.
    """
    try:
        # A subclass of the safe loader.
        return yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        problem = " ".join(f"{error.context or ''} {error.problem or ''}".split())
        raise SettingsError(f"{source} must be YAML, got at {place}{problem}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise SettingsError(f"{source} must be YAML, got {' '.join(str(error).split())}") from error


class _Loader(yaml.SafeLoader):
    """YAML of plain types; 1e-3 is a number, a date is text, and no key is given twice."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Hashable, Any]:
        seen = set()
        for key, _ in node.value:
            name = key.value if isinstance(key, yaml.ScalarNode) else None
            if name is None or name in seen:
                what = "a key that is no text" if name is None else f"the key {name!r} a second time"
                raise yaml.constructor.ConstructorError(None, None, what, key.start_mark)
            # A merge key, "<<", may be there more than once.
            if key.tag != "tag:yaml.org,2002:merge":
                seen.add(name)
        return {str(key): value for key, value in super().construct_mapping(node, deep).items()}


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith((":float", ":timestamp"))]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"^[-+]?(\d[\d_]*\.[\d_]*|\.\d[\d_]*|\d[\d_]*(?=[eE]))([eE][-+]?\d+)?$|^[-+]?\.(inf|Inf|INF)$|^\.(nan|NaN|NAN)$"
    ),
    list("-+0123456789."),
)


def check_fields(kind: Any, values: Mapping[str, Any], name: str = "") -> dict[str, Any]:
    """Check some of the fields of a dataclass.

    Args:
        kind: The dataclass; fields may be dataclasses, and lists of them, themselves.
        values: Plain values by field.
        name: What holds them, in errors.

    Returns:
        The fields, with dataclasses in the place of mappings.

    Raises:
        SettingsError: If a field is unknown, or its value of another type or out of its range.
    """
    prefix = f"{name}: " if name else ""
    known = [f.name for f in fields(kind) if f.init]
    unknown = [field for field in values if field not in known]
    if unknown:
        raise SettingsError(f"{prefix}{unknown[0]} must be one of the fields {', '.join(known)}, got {unknown[0]!r}")
    checked = {}
    for field, value in values.items():
        try:
            # JSON, because there alone pydantic's strict mode takes mappings for dataclasses.
            checked[field] = _adapter(kind, field).validate_json(json.dumps(value, default=_plain), strict=True)
        except ValidationError as error:
            raise SettingsError(prefix + _sentence(error, kind, field, value)) from error
        except (ValueError, TypeError, RecursionError) as error:
            raise SettingsError(f"{prefix}{field} must be plain values, got {error}") from error
    return checked


def build(kind: type[_Kind], values: Mapping[str, Any], name: str = "") -> _Kind:
    """A dataclass of plain values.

    Args:
        kind: The dataclass.
        values: Its fields.
        name: What holds them, in errors.

    Raises:
        SettingsError: As :func:`check_fields` raises, or if a field is missing or does not fit the others.
    """
    prefix = f"{name}: " if name else ""
    checked = check_fields(kind, values, name)
    required = [f.name for f in fields(kind) if f.default is MISSING and f.default_factory is MISSING]  # type: ignore[arg-type]
    missing = [field for field in required if field not in values]
    if missing:
        raise SettingsError(f"{prefix}{missing[0]} must be given, got {', '.join(values) or 'no field'}")
    try:
        return kind(**checked)
    except ValidationError as error:
        raise SettingsError(prefix + str(error.errors()[0]["msg"]).removeprefix("Value error, ")) from error
    except ValueError as error:
        raise SettingsError(f"{prefix}{error}") from error


def shorten(value: object) -> str:
    """``repr(value)`` of at most 100 characters."""
    text = "nothing" if value is None else repr(value)
    return text if len(text) <= 100 else f"{text[:97]}..."


def _plain(value: Any) -> Any:
    """Dataclasses among plain values, as they were."""
    if is_dataclass(value) and not isinstance(value, type):
        return {f.name: getattr(value, f.name) for f in fields(value)}
    raise TypeError(f"a {type(value).__name__}")


@cache
def _adapter(kind: Any, field: str) -> TypeAdapter[Any]:
    return TypeAdapter(get_type_hints(kind, include_extras=True)[field])


def _sentence(error: ValidationError, kind: Any, field: str, value: Any) -> str:
    """The first field that is wrong; for a choice of types, what each of them expected."""
    found = error.errors(include_url=False)
    path, received = _follow(field, value, found[0]["loc"])
    last, message = found[0]["type"], found[0]["msg"]
    if last == "missing":
        return f"{path} must have {found[0]['loc'][-1]}, got {shorten(received)}"
    if last == "unexpected_keyword_argument":
        known = ", ".join(f.name for f in fields(_class_of(kind, (field, *found[0]["loc"][:-1]))))
        return f"{path} must be one of the fields {known}, got {shorten(found[0]['loc'][-1])}"
    if last == "value_error":
        reason = message.removeprefix("Value error, ")
        return f"{path} {reason}" if reason.startswith("must ") else f"{path}: {reason}"
    same = [item for item in found if _follow(field, value, item["loc"])[0] == path]
    # Sorted, because the order of a choice of types is not fixed.
    expected = sorted({_EXPECTED.get(item["type"], _after_should(item["msg"])) for item in same})
    return f"{path} must {' or '.join(expected)}, got {shorten(received)}"


def _after_should(message: str) -> str:
    """ "be greater than 0" of "Input should be greater than 0"."""
    return message.partition(" should ")[2].partition(" after validation")[0]


def _follow(field: str, value: Any, loc: _Loc) -> tuple[str, Any]:
    """The place ``loc`` in words, and what is there."""
    path = field
    for part in loc:
        if isinstance(value, Mapping) and part in value:
            path, value = f"{path}.{part}", value[part]
        elif isinstance(value, list) and isinstance(part, int):
            value = value[part]
            name = value.get("name") if isinstance(value, Mapping) else None
            path += f"[{name!r}]" if isinstance(name, str) else f"[{part}]"
        # Other parts are missing fields, or the types of a choice.
    return path, value


def _class_of(kind: Any, loc: _Loc) -> Any:
    """The dataclass at ``loc``."""
    for part in loc:
        if isinstance(part, str):
            hints = [get_type_hints(kind)[part]]
            while not is_dataclass(hints[0]):
                hints = [*hints[1:], *get_args(hints[0])]
            kind = hints[0]
    return kind
