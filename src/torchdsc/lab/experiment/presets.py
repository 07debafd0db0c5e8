"""Presets: experiments that come with the package, as YAML."""

from pathlib import Path

from torchdsc.lab.schema import SettingsError, did_you_mean

__all__ = ["preset_file", "preset_names"]

_FOLDER = Path(__file__).parents[2] / "configs"


def preset_names() -> list[str]:
    """Names of the presets."""
    return sorted(file.stem for file in _FOLDER.glob("*.yaml"))


def preset_file(name: str) -> Path:
    """The file of a preset.

    Raises:
        SettingsError: If there is no such preset.
    """
    names = preset_names()
    if name not in names:
        raise SettingsError(
            f"experiment must be a YAML file or one of {', '.join(names)}, got {name!r}{did_you_mean(name, names)}"
        )
    return _FOLDER / f"{name}.yaml"
