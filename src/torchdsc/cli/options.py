"""Options of an experiment on the command line: a preset, then a file, then flags, each over the one before."""

from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from jsonargparse import Namespace

from torchdsc.lab.config import ExperimentConfig, load_preset, preset_names

from .parsing import ArgumentParser, command_parser

_LISTS = ("--methods", "--seeds")


def experiment_parser(command: str, description: str, default_preset: str) -> ArgumentParser:
    """A parser with every field of :class:`ExperimentConfig` as a flag."""
    usage = "[--preset NAME] [--config FILE] [--output FOLDER] [--SETTING VALUE ...]"
    parser = command_parser(command, description, usage)
    parser.add_argument("--preset", default=default_preset, help=f"settings to start from: {', '.join(preset_names())}")
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
    arguments = _in_order(arguments)
    options = _parse(parser, arguments, str(parser.get_default("preset")))
    values: dict[str, Any] = {f.name: options[f.name] for f in fields(ExperimentConfig)}
    corpus = Path(values["corpus"]).expanduser()
    if corpus.exists() and "/" in values["corpus"]:
        # The same folder under another spelling is the same experiment.
        values["corpus"] = str(corpus.resolve())
    return options, ExperimentConfig(**values)


def _parse(parser: ArgumentParser, arguments: list[str], preset: str) -> Namespace:
    parser.set_defaults({**asdict(ExperimentConfig()), **load_preset(preset)})
    options = parser.parse_args(arguments)
    # A flag or a file may name another preset than the one its values were taken from.
    return options if options.preset == preset else _parse(parser, arguments, options.preset)


def _in_order(arguments: Sequence[str]) -> list[str]:
    """Files before flags, wherever they were given; ``--seeds 1 2`` and ``--seeds 1,2`` as ``--seeds=[1,2]``."""
    files: list[str] = []
    flags: list[str] = []
    rest = list(arguments)
    while rest:
        name, equals, value = rest.pop(0).partition("=")
        if name == "--config" and (equals or rest):
            files.append(f"--config={value if equals else rest.pop(0)}")
        elif name in _LISTS and (equals or (rest and not rest[0].startswith("--"))):
            items = [value] if equals else []
            while rest and not rest[0].startswith("--"):
                items.append(rest.pop(0))
            joined = ",".join(items)
            flags.append(f"{name}={joined if joined.startswith('[') else f'[{joined}]'}")
        else:
            flags.append(name + equals + value)
    return files + flags
