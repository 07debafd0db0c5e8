"""Presets: settings that come with the package, as YAML."""

from collections.abc import Iterable
from difflib import get_close_matches
from importlib import resources
from itertools import takewhile
from typing import Any

import yaml

__all__ = ["describe_preset", "did_you_mean", "preset_names", "read_preset"]


def preset_names(*folder: str) -> list[str]:
    """Names of the presets in ``configs`` or a folder of it."""
    files = _place(*folder).iterdir()
    return sorted(file.name.removesuffix(".yaml") for file in files if file.name.endswith(".yaml"))


def read_preset(name: str, *folder: str) -> dict[str, Any]:
    """Values of a preset.

    Raises:
        ValueError: If there is no such preset.
    """
    values: dict[str, Any] = yaml.safe_load(_text(name, *folder))
    return values


def describe_preset(name: str, *folder: str) -> str:
    """What a preset is for: the comment that its file begins with.

    Raises:
        ValueError: If there is no such preset.
    """
    comment = takewhile(lambda line: line.startswith("#"), _text(name, *folder).splitlines())
    return " ".join(line.removeprefix("#").strip() for line in comment)


def did_you_mean(name: object, known: Iterable[str]) -> str:
    """The known name that is closest to an unknown one, as the end of an error; empty where none is close."""
    near = get_close_matches(str(name), known, n=1)
    return f" (did you mean {near[0]}?)" if near else ""


def _text(name: str, *folder: str) -> str:
    names = preset_names(*folder)
    if name not in names:
        raise ValueError(f"preset must be one of {names}, got {name!r}{did_you_mean(name, names)}")
    text: str = _place(*folder, f"{name}.yaml").read_text(encoding="utf-8")
    return text


def _place(*parts: str) -> Any:
    return resources.files("torchdsc").joinpath("configs", *parts)
