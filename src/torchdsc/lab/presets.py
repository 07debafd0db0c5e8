"""Presets: settings that come with the package, as YAML."""

from importlib import resources
from typing import Any

import yaml

__all__ = ["preset_names", "read_preset"]


def preset_names(*folder: str) -> list[str]:
    """Names of the presets in ``configs`` or a folder of it."""
    files = _place(*folder).iterdir()
    return sorted(file.name.removesuffix(".yaml") for file in files if file.name.endswith(".yaml"))


def read_preset(name: str, *folder: str) -> dict[str, Any]:
    """Values of a preset.

    Raises:
        ValueError: If there is no such preset.
    """
    if name not in preset_names(*folder):
        raise ValueError(f"preset must be one of {preset_names(*folder)}, got {name!r}")
    values: dict[str, Any] = yaml.safe_load(_place(*folder, f"{name}.yaml").read_text(encoding="utf-8"))
    return values


def _place(*parts: str) -> Any:
    return resources.files("torchdsc").joinpath("configs", *parts)
