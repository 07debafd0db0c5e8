"""Settings from YAML, checked by pydantic; errors are one line: the setting, what was expected and what came."""

import re
from collections.abc import Hashable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import fields
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_type_hints

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

__all__ = [
    "Count",
    "Model",
    "Name",
    "Rate",
    "Seed",
    "SettingsError",
    "Unique",
    "build",
    "check_fields",
    "did_you_mean",
    "naming",
    "parse_yaml",
    "read_yaml",
    "shorten",
]

# In words that fit YAML, where pydantic's are those of Python.
_EXPECTED = {
    "int_type": "be an integer",
    "float_type": "be a number",
    "bool_type": "be true or false",
    "string_type": "be text",
    "list_type": "be a list",
    "dict_type": "be a mapping",
    "model_type": "be a mapping",
    "model_attributes_type": "be a mapping",
}


class SettingsError(ValueError):
    """A setting that is unknown, missing, of another type, or out of its range."""


class Model(BaseModel):
    """Settings that cannot change: 2.5 is no int, "no" is no bool, and an unknown field is an error."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, use_attribute_docstrings=True)


_Model = TypeVar("_Model", bound=Model)


def _all_different(values: list[Any]) -> list[Any]:
    if len(set(values)) != len(values):
        raise ValueError(f"must be different values, got {shorten(values)}")
    return values


# Of a list: no value twice.
Unique = AfterValidator(_all_different)
Name = Annotated[str, Field(min_length=1)]
Count = Annotated[int, Field(ge=1)]
Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]
# As numpy takes them.
Seed = Annotated[int, Field(ge=0, lt=2**32)]


def build(kind: type[_Model], values: Mapping[str, Any], source: str = "") -> _Model:
    """Settings of plain values, by field, of which they keep copies; ``source`` is what holds them, in errors.

    Raises:
        SettingsError: If a field is unknown or missing, of another type or out of its range, or does not fit others.
    """
    try:
        return kind.model_validate(deepcopy(dict(values)))
    except ValidationError as error:
        raise SettingsError((f"{source}: " if source else "") + _sentence(error, kind, values)) from error


def check_fields(kind: type, values: Mapping[str, Any], source: str) -> None:
    """Check values by the types of a dataclass that is no :class:`Model`, such as a configuration of PEFT.

    Raises:
        SettingsError: If a field is unknown, or of another type.
    """
    known = [f.name for f in fields(kind) if f.init]
    hints = get_type_hints(kind, include_extras=True)
    for name, value in values.items():
        if name not in known:
            raise SettingsError(f"{source}: {_unknown(name, known)}")
        try:
            TypeAdapter(hints[name]).validate_python(value, strict=True)
        except ValidationError as error:
            expected = sorted({_expected(item) for item in error.errors(include_url=False)})
            raise SettingsError(f"{source}: {name} must {' or '.join(expected)}, got {shorten(value)}") from error


@contextmanager
def naming(source: object) -> Iterator[None]:
    """Errors of settings inside name the ``source`` they come from."""
    try:
        yield
    except SettingsError as error:
        raise SettingsError(f"{source}: {error}") from error


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
    """The one value of a YAML document of plain types, which errors call ``source``.

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


def shorten(value: object) -> str:
    """``repr(value)`` of at most 100 characters."""
    text = "nothing" if value is None else repr(value)
    return text if len(text) <= 100 else f"{text[:97]}..."


def did_you_mean(name: object, known: Iterable[str]) -> str:
    """The known name that is closest to an unknown one, as the end of an error; empty where none is close."""
    near = get_close_matches(str(name), known, n=1)
    return f" (did you mean {near[0]}?)" if near else ""


def _sentence(error: ValidationError, kind: type[Model], values: Any) -> str:
    """The first thing that is wrong, in words."""
    found = error.errors(include_url=False)[0]
    path, message, received = "", str(found["msg"]), values
    for part in found["loc"]:
        known = isinstance(received, Mapping) and part in received
        if not known and not (isinstance(received, list) and isinstance(part, int) and part < len(received)):
            continue
        received = received[part]
        name = received.get("name") if isinstance(received, Mapping) and isinstance(part, int) else None
        inside = f"[{name!r}]" if isinstance(name, str) else f"[{part}]" if isinstance(part, int) else f".{part}"
        path = f"{path}{inside}".removeprefix(".")
    last = found["loc"][-1] if found["loc"] else ""
    if found["type"] == "missing":
        return f"{last} must be given{f' in {path}' if path else ''}, got {shorten(list(received) or 'no field')}"
    if found["type"] == "extra_forbidden":
        owner = path.rpartition(".")[0]
        return (f"{owner}: " if owner else "") + _unknown(str(last), _fields_at(kind, found["loc"][:-1]))
    if found["type"] == "value_error":
        reason = message.removeprefix("Value error, ")
        return reason if not path else f"{path} {reason}" if reason.startswith("must ") else f"{path}: {reason}"
    return f"{path} must {_expected(found)}, got {shorten(received)}"


def _unknown(name: str, known: Iterable[str]) -> str:
    known = list(known)
    return f"{name} must be one of the fields {', '.join(known)}, got {name!r}{did_you_mean(name, known)}"


def _expected(found: Mapping[str, Any]) -> str:
    """ "be greater than 0" of "Input should be greater than 0"."""
    message = str(found["msg"]).partition(" should ")[2].partition(" after validation")[0]
    return _EXPECTED.get(str(found["type"]), message)


def _fields_at(kind: Any, place: tuple[int | str, ...]) -> list[str]:
    """The fields of the model at a place of another."""
    for part in place:
        if isinstance(part, str) and part in kind.model_fields:
            hint = kind.model_fields[part].annotation
            kind = next(
                (item for item in (hint, *getattr(hint, "__args__", ())) if hasattr(item, "model_fields")), kind
            )
    return list(kind.model_fields)
