"""Options of an experiment on the command line: a preset, then a file, then flags, each over the one before."""

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import Namespace

from torchdsc.lab.config import ExperimentConfig, load_preset, preset_names

from .parsing import ArgumentParser, command_parser, without_looking

_LISTS = ("--methods", "--seeds")


def experiment_parser(command: str, description: str, default_preset: str) -> ArgumentParser:
    """A parser with every field of :class:`ExperimentConfig` as a flag."""
    usage = "[--preset NAME] [--config FILE] [--output FOLDER] [--SETTING VALUE ...]"
    parser = command_parser(command, description, usage)
    presets = f"{', '.join(preset_names())}; `torchdsc presets` says what each is for"
    parser.add_argument("--preset", default=default_preset, help=f"settings to start from: {presets}")
    parser.add_argument("--config", action="config", help="YAML file of settings over the preset's")
    parser.add_class_arguments(ExperimentConfig, nested_key=None)
    return parser


def parse_experiment(parser: ArgumentParser, arguments: Sequence[str]) -> tuple[Namespace, ExperimentConfig]:
    """Parse the command line.

    Args:
        parser: From :func:`experiment_parser`.
        arguments: Command line.

    Returns:
        All options, and the experiment.

    Raises:
        ArgumentError: If a flag or setting is unknown, or a value of the wrong type.
        ValueError: If the preset is unknown, or a value out of its range.
    """
    ordered, single = _in_order(arguments)
    options = _parse(parser, ordered)
    values: dict[str, Any] = {f.name: options[f.name] for f in fields(ExperimentConfig)}
    values["overrides"] = deepcopy(values["overrides"])
    for path, text in single:
        _set(values["overrides"], path, text)
    corpus = Path(values["corpus"]).expanduser()
    if corpus.exists() and "/" in values["corpus"]:
        # The same folder under another spelling is the same experiment.
        values["corpus"] = str(corpus.resolve())
    return options, ExperimentConfig(**values)


def _parse(parser: ArgumentParser, arguments: list[str]) -> Namespace:
    # A flag or a file may name the preset. The first look finds out which, before anything is shown or taken from one.
    preset = parser.parse_args(without_looking(arguments)).preset
    parser.set_defaults({**asdict(ExperimentConfig()), **load_preset(preset)})
    return parser.parse_args(arguments)


def _in_order(arguments: Sequence[str]) -> tuple[list[str], list[tuple[str, str]]]:
    """Files before flags, wherever they were given; ``--seeds 1 2`` and ``--seeds 1,2`` as ``--seeds=[1,2]``.

    Flags that set one override, such as ``--overrides.moe.learning_rate 0.002``, come apart from the rest: the parser
    would drop the method's others.
    """
    files: list[str] = []
    flags: list[str] = []
    single: list[tuple[str, str]] = []
    rest = list(arguments)
    while rest:
        name, equals, value = rest.pop(0).partition("=")
        if name == "--config" and (equals or rest):
            files.append(f"--config={value if equals else rest.pop(0)}")
        elif name.startswith("--overrides.") and (equals or rest):
            single.append((name.removeprefix("--overrides."), value if equals else rest.pop(0)))
        elif name in _LISTS and (equals or (rest and not rest[0].startswith("--"))):
            items = [value] if equals else []
            while rest and not rest[0].startswith("--"):
                items.append(rest.pop(0))
            joined = ",".join(item.strip(",") for item in items)
            flags.append(f"{name}={joined if joined.startswith('[') else f'[{joined}]'}")
        else:
            flags.append(name + equals + value)
    return files + flags, single


def _set(overrides: dict[str, Any], path: str, text: str) -> None:
    *parents, name = path.split(".")
    for key in parents:
        overrides = overrides.setdefault(key, {})
        if not isinstance(overrides, dict):
            raise ValueError(f"--overrides.{path} must name a setting, got {key} = {overrides!r} above it")
    try:
        # YAML takes 2e-3 for text.
        overrides[name] = int(text) if text.isdecimal() else float(text)
    except ValueError:
        try:
            overrides[name] = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ValueError(f"--overrides.{path} must be YAML, got {text!r}") from error
