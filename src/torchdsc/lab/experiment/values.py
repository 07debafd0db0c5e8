"""The values of an experiment before they are checked: read, extended by others, and limited to some variants."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torchdsc.lab.schema import SettingsError, naming, read_yaml, shorten

from .presets import preset_file

__all__ = ["Values", "check_names", "merge", "only_variants", "read_experiment"]

Values = dict[str, Any]


def only_variants(values: Values, names: Sequence[str]) -> Values:
    """The values of an experiment with the variants of these names alone.

    Raises:
        SettingsError: If a name is unknown.
    """
    every = values.get("variants") or []
    check_names("variants", names, [item.get("name") for item in every])
    kept = [{**item} for item in every if item.get("name") in names]
    for item in kept:
        if item.get("against"):
            item["against"] = [name for name in item["against"] if name in names]
    reference = values.get("reference")
    return {**values, "variants": kept, "reference": reference if reference in names else None}


def check_names(name: str, chosen: Sequence[str], known: Sequence[Any]) -> None:
    """Refuse a name that is not known."""
    unknown = [item for item in chosen if item not in known]
    if unknown:
        raise SettingsError(f"{name} must be among those of the experiment, {known}, got {unknown[0]!r}")


def read_experiment(source: str, *, below: Sequence[str] = ()) -> Values:
    """The values of a preset or of a YAML file, over those of the experiment that it ``extends``.

    Args:
        source: Name of a preset, or a path that ends in ``.yaml`` or ``.yml``.
        below: Sources that this one is extended by.

    Raises:
        SettingsError: If there is no such preset, the file holds no settings or not in the form of an experiment, or
            experiments extend each other in a circle.
        OSError: If the file cannot be read.
    """
    is_file = source.endswith((".yaml", ".yml"))
    if source in below:
        raise SettingsError(f"extends must not lead back to an experiment, got {' -> '.join([*below, source])}")
    values = read_yaml(Path(source) if is_file else preset_file(source))
    with naming(source):
        _check_form(values)
    base = values.pop("extends", None)
    if base is None:
        return values
    if not isinstance(base, str):
        raise SettingsError(f"{source}: extends must be a preset or a YAML file, got {base!r}")
    if is_file and base.endswith((".yaml", ".yml")):
        base = str(Path(source).parent / base)
    with naming(source):
        inherited = read_experiment(base, below=[*below, source])
    settings = merge(inherited.get("settings", {}), values.get("settings") or {})
    return {**inherited, **values, "settings": settings}


def _check_form(values: Values) -> None:
    """Refuse what is no mapping, or no list of them, where one is looked into before all fields are checked."""
    if not isinstance(values.get("task", ""), str):
        raise SettingsError(f"task must be a name, got {shorten(values['task'])}")
    for name in ("settings", "trial_settings", "cases"):
        _check_mapping(name, values.get(name))
    for name, case in (values.get("cases") or {}).items():
        _check_mapping(f"cases.{name}", case)
    for place, variant in enumerate(_list(values, "variants", "variants")):
        where = f"variants.{place}"
        if variant is None:
            raise SettingsError(f"{where} must be a mapping, got nothing")
        _check_mapping(where, variant)
        _check_mapping(f"{where}.settings", variant.get("settings"))
        for index, trial in enumerate(_list(variant, "trials", f"{where}.trials")):
            _check_mapping(f"{where}.trials.{index}", trial)


def _list(values: Values, name: str, where: str) -> list[Any]:
    found = values.get(name)
    if not isinstance(found, list | None):
        raise SettingsError(f"{where} must be a list, got {shorten(found)}")
    return found or []


def _check_mapping(where: str, value: Any) -> None:
    if not isinstance(value, dict | None):
        raise SettingsError(f"{where} must be a mapping, got {shorten(value)}")


def merge(values: Mapping[str, Any], over: Mapping[str, Any]) -> Values:
    """``values`` with those of ``over``; where both have a mapping, that is merged by its keys."""
    merged = dict(values)
    for name, value in over.items():
        before = merged.get(name)
        merged[name] = merge(before, value) if isinstance(before, dict) and isinstance(value, dict) else value
    return merged
