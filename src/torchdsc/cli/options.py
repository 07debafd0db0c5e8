"""Options of an experiment on the command line: a preset, then a file, then flags, each over the one before."""

from dataclasses import fields
from pathlib import Path
from typing import Any

try:
    from jsonargparse import ActionConfigFile, ArgumentParser, Namespace
except ImportError as error:
    raise ImportError("the command line needs jsonargparse: pip install 'torchdsc[lab]'") from error

from torchdsc.lab.config import ExperimentConfig, load_preset, preset_names


def experiment_parser(program: str, description: str, default_preset: str) -> ArgumentParser:
    """A parser with every field of :class:`ExperimentConfig` as a flag."""
    parser = ArgumentParser(prog=program, description=description)
    parser.add_argument("--preset", default=default_preset, help=f"settings to start from: {', '.join(preset_names())}")
    parser.add_argument("--config", action=ActionConfigFile, help="YAML file of settings over the preset's")
    parser.add_class_arguments(ExperimentConfig, nested_key=None)
    return parser


def parse_experiment(parser: ArgumentParser, arguments: list[str]) -> tuple[Namespace, ExperimentConfig]:
    """Parse the command line.

    Args:
        parser: From :func:`experiment_parser`.
        arguments: Command line.

    Returns:
        All options, and the experiment.

    Raises:
        ValueError: If the preset is unknown, or a value out of its range.
    """
    parser.set_defaults(load_preset(_preset(parser, arguments)))
    options = parser.parse_args(arguments)
    values: dict[str, Any] = {f.name: options[f.name] for f in fields(ExperimentConfig)}
    corpus = Path(values["corpus"]).expanduser()
    if corpus.exists() and "/" in values["corpus"]:
        # The same folder under another spelling is the same experiment.
        values["corpus"] = str(corpus.resolve())
    return options, ExperimentConfig(**values)


def _preset(parser: ArgumentParser, arguments: list[str]) -> str:
    for index, argument in enumerate(arguments):
        if argument == "--preset" and index + 1 < len(arguments):
            return arguments[index + 1]
        if argument.startswith("--preset="):
            return argument.partition("=")[2]
    return str(parser.get_default("preset"))
