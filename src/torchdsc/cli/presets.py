"""``torchdsc presets``."""

from textwrap import fill

from torchdsc.lab.experiment.presets import preset_names
from torchdsc.lab.experiment.values import read_experiment

from .parsing import ArgumentParser


def run(arguments: list[str]) -> int:
    """List the experiments that come with the package, and what each is for."""
    ArgumentParser("presets", "List the experiments that come with the package.").parse_args(arguments)
    for name in preset_names():
        print(fill(f"{name:<13} {read_experiment(name)['title']}", 100, subsequent_indent=" " * 14))
    return 0
