from dataclasses import field
from typing import Annotated, Any

import pytest
import yaml
from pydantic import Field
from pydantic.dataclasses import dataclass

from torchdsc.lab.presets import preset_names, read_preset
from torchdsc.lab.schema import STRICT, SettingsError, build, check_fields, parse_yaml, read_yaml


@dataclass(frozen=True, config=STRICT)
class Inner:
    name: str
    sizes: list[int] | str | None = None


@dataclass(frozen=True, config=STRICT)
class Outer:
    inner: list[Inner]
    rate: Annotated[float, Field(gt=0)] = 1.0
    flag: bool = False
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.flag and self.options:
            raise ValueError(f"options must be left out with flag, got {self.options}")


# What is no mapping, and what is no YAML.
FILES = {
    "empty": (b"", "must hold settings by name, got nothing"),
    "comment alone": (b"# nothing\n", "must hold settings by name, got nothing"),
    "null": (b"null\n", "must hold settings by name, got nothing"),
    "list": (b"- a\n- b\n", r"must hold settings by name, got \['a', 'b'\]"),
    "text": (b"hello", "must hold settings by name, got 'hello'"),
    "number": (b"5", "must hold settings by name, got 5"),
    "malformed": (b"a: [1, 2\nb: 3", "must be YAML, got at line 2, column 2: while parsing a flow sequence"),
    "binary": (b"\x80\x00\xff\x12", "must be YAML, got unacceptable character"),
    "null bytes": (b"a: \x00", "must be YAML, got unacceptable character"),
    "half of utf-16": (b"\xff\xfea", "must be YAML, got"),
    "two documents": (b"a: 1\n---\na: 2\n", "must be YAML, got at line 2, column 1: expected a single document"),
    "tabs": (b"a:\n\tb: 1\n", "must be YAML, got at line 2, column 1: .* cannot start any token"),
    "unknown tag": (b"a: !thing 3", "must be YAML, got at line 1, column 4: could not determine a constructor"),
    "Python object": (
        b"a: !!python/object/apply:os.getcwd []",
        "must be YAML, got at line 1, column 4: could not determine a",
    ),
    "key twice": (b"a: 1\nb: 2\na: 3\n", "must be YAML, got at line 3, column 1: the key 'a' a second time"),
    "key that is a list": (b"? [a]\n: 3\n", "must be YAML, got at line 1, column 3: a key that is no text"),
    "deep": (b"[" * 5000, "must be YAML, got"),
    "long number": (b"a: " + b"9" * 5000, "must be YAML, got Exceeds the limit"),
}


@pytest.mark.parametrize("kind", FILES)
def test_files_that_hold_no_settings(tmp_path, kind):
    content, message = FILES[kind]
    (tmp_path / "a.yaml").write_bytes(content)
    with pytest.raises(SettingsError, match=rf"a\.yaml {message}") as raised:
        read_yaml(tmp_path / "a.yaml")
    assert "\n" not in str(raised.value)


def test_yaml_of_plain_types():
    text = "{a: 1e-3, b: 5.0e-2, c: 2024-01-01, d: [1, -2.5, .5, .inf, 1E5, 1e, yes, ~], <<: {e: 0x1F, a: 3}, 5: x}"
    assert parse_yaml(text, "text") == {
        **{"a": 1e-3, "b": 0.05, "c": "2024-01-01", "d": [1, -2.5, 0.5, float("inf"), 1e5, "1e", True, None]},
        **{"e": 31, "5": "x"},
    }


@pytest.mark.parametrize("folder", [(), ("adapt",), ("study",)])
def test_presets_read_as_by_the_safe_loader(folder):
    for name in preset_names(*folder):
        values = read_preset(name, *folder)
        assert parse_yaml(yaml.safe_dump(values), name) == values


def test_mappings_become_dataclasses():
    built = build(Outer, {"inner": [{"name": "a", "sizes": [1]}, Inner("b")], "rate": 2, "options": {"x": 1}})
    assert built == Outer([Inner("a", [1]), Inner("b")], 2.0, options={"x": 1})
    # Options are kept as they are: the names of runs are made of them.
    assert type(built.options["x"]) is int


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "^file: inner must be given, got no field$"),
        (
            {"inner": [{"name": "a"}], "other": 1},
            "^file: other must be one of the fields inner, rate, .*, got 'other'$",
        ),
        ({"inner": [{}]}, r"^file: inner\[0\] must have name, got {}$"),
        ({"inner": [{"name": "a", "size": 1}]}, r"^file: inner\['a'\].size must be one of the fields name, sizes, got"),
        ({"inner": [{"name": "a", "sizes": [1.5]}]}, r"^file: inner\['a'\].sizes\[0\] must be an integer, got 1.5$"),
        ({"inner": [{"name": "a", "sizes": 5}]}, r"^file: inner\['a'\].sizes must be a list or be text, got 5$"),
        ({"inner": [], "rate": float("nan")}, "^file: rate must be greater than 0, got nan$"),
        ({"inner": [], "flag": "no"}, "^file: flag must be true or false, got 'no'$"),
        ({"inner": [], "flag": True, "options": {"x": 1}}, "^file: options must be left out with flag, got {'x': 1}$"),
        ({"inner": [], "options": {"x": b"1"}}, "^file: options must be plain values, got a bytes$"),
        ({"inner": "x" * 300}, r"^file: inner must be a list, got 'x{96}\.\.\.$"),
    ],
)
def test_errors_are_a_line_with_file_and_field(values, message):
    with pytest.raises(SettingsError, match=message):
        build(Outer, values, "file")


def test_what_refers_to_itself():
    options: dict[str, Any] = {}
    options["x"] = options
    with pytest.raises(SettingsError, match=r"^options must be plain values"):
        check_fields(Outer, {"options": options})
