"""Settings from YAML, and errors of a line that name the setting, what was expected and what came."""

from typing import Annotated, Any

import pytest
from pydantic import Field, model_validator

from torchdsc.lab.schema import Model, SettingsError, build, check_fields, parse_yaml, read_yaml


class Inner(Model):
    name: str
    sizes: list[int] | None = None


class Outer(Model):
    inner: list[Inner]
    rate: Annotated[float, Field(gt=0)] = 1.0
    flag: bool = False
    options: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _check(self):
        if self.flag and self.options:
            raise ValueError(f"options must be left out with flag, got {self.options}")
        return self


# What is no mapping, and what is no YAML.
FILES = {
    "empty": (b"", "must hold settings by name, got nothing"),
    "list": (b"- a\n- b\n", r"must hold settings by name, got \['a', 'b'\]"),
    "number": (b"5", "must hold settings by name, got 5"),
    "malformed": (b"a: [1, 2\nb: 3", "must be YAML, got at line 2, column 2: while parsing a flow sequence"),
    "binary": (b"\x80\x00\xff\x12", "must be YAML, got unacceptable character"),
    "half of utf-16": (b"\xff\xfea", "must be YAML, got"),
    "two documents": (b"a: 1\n---\na: 2\n", "must be YAML, got at line 2, column 1: expected a single document"),
    "tabs": (b"a:\n\tb: 1\n", "must be YAML, got at line 2, column 1: .* cannot start any token"),
    "Python object": (b"a: !!python/object/apply:os.getcwd []", "must be YAML, got at line 1, column 4: could not"),
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


def test_settings_keep_copies():
    values = {"inner": [{"name": "a", "sizes": [1]}], "rate": 2, "options": {"x": [1]}}
    built = build(Outer, values)
    values["options"]["x"].append(2)
    values["inner"][0]["sizes"].append(2)
    assert (built.inner[0].sizes, built.options, built.rate) == ([1], {"x": [1]}, 2.0)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, r"^file: inner must be given, got 'no field'$"),
        (
            {"inner": [{"name": "a"}], "othr": 1},
            "^file: othr must be one of the fields inner, rate, flag, opti.*'othr'$",
        ),
        ({"inner": [], "flags": 1}, r"got 'flags' \(did you mean flag\?\)$"),
        ({"inner": [{}]}, r"^file: name must be given in inner\[0\], got 'no field'$"),
        ({"inner": [{"name": "a", "siz": 1}]}, r"^file: inner\['a'\]: siz must be one of the fields name, sizes, got"),
        ({"inner": [{"name": "a", "sizes": [1.5]}]}, r"^file: inner\['a'\].sizes\[0\] must be an integer, got 1.5$"),
        ({"inner": [{"name": "a", "sizes": 5}]}, r"^file: inner\['a'\].sizes must be a list, got 5$"),
        ({"inner": ["a"]}, r"^file: inner\[0\] must be a mapping, got 'a'$"),
        ({"inner": [], "rate": float("nan")}, "^file: rate must be greater than 0, got nan$"),
        ({"inner": [], "rate": "fast"}, "^file: rate must be a number, got 'fast'$"),
        ({"inner": [], "flag": "no"}, "^file: flag must be true or false, got 'no'$"),
        ({"inner": [], "flag": True, "options": {"x": 1}}, "^file: options must be left out with flag, got {'x': 1}$"),
        ({"inner": [], "options": [1]}, r"^file: options must be a mapping, got \[1\]$"),
        ({"inner": "x" * 300}, r"^file: inner must be a list, got 'x{96}\.\.\.$"),
    ],
)
def test_errors_are_a_line_with_source_and_field(values, message):
    with pytest.raises(SettingsError, match=message):
        build(Outer, values, "file")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rr": 8}, r"^options: rr must be one of the fields .*, got 'rr' \(did you mean r\?\)$"),
        ({"r": "many"}, "^options: r must be an integer, got 'many'$"),
        ({"target_modules": 5}, "^options: target_modules must be a list or be text, got 5$"),
    ],
)
def test_fields_of_a_foreign_dataclass(options, message):
    from peft import LoraConfig

    check_fields(LoraConfig, {"r": 4, "target_modules": ["query"]}, "options")
    with pytest.raises(SettingsError, match=message):
        check_fields(LoraConfig, options, "options")
