"""Argument parsers that raise errors instead of exiting, and the texts of such errors."""

import re
from argparse import SUPPRESS, ArgumentError
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import jsonargparse
import yaml

from torchdsc.lab.presets import did_you_mean

__all__ = [
    "SUPPRESS",
    "ArgumentError",
    "ArgumentParser",
    "add_dry_run",
    "add_print_config",
    "command_parser",
    "describe",
    "print_settings",
    "underscored",
    "without_looking",
]

_UNKNOWN = re.compile(r"unrecognized arguments: --([\w.]+)|Option '([\w.]+)' is not accepted")


class ArgumentParser(jsonargparse.ArgumentParser):
    """jsonargparse's parser, which also suggests a known name for an unknown flag or setting."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise ``ArgumentError``, with the guess."""
        unknown = _UNKNOWN.match(message)
        # jsonargparse comes here again with the error that it was given here.
        if unknown and "did you mean" not in message:
            flag, setting = unknown.groups()
            known = [action.dest for action in self._actions]
            message += did_you_mean(setting, known) if setting else did_you_mean(f"--{flag}", [f"--{k}" for k in known])
        super().error(message, ex)

    def hide(self, *names: str) -> None:
        """Leave settings out of the help and of what is printed; files may still hold them."""
        for action in self._actions:
            if action.dest in names:
                action.help = SUPPRESS


def command_parser(command: str, description: str, usage: str | None = None, **options: Any) -> ArgumentParser:
    """A parser that raises ``ArgumentError`` where it would print its usage and exit.

    Args:
        command: Name of the command.
        description: Its line of help.
        usage: What follows the program's name, where the generated line is too long.
        **options: Further ones of the parser.
    """
    program = f"torchdsc {command}"
    return ArgumentParser(
        prog=program,
        description=description,
        usage=usage and f"{program} {usage}",
        exit_on_error=False,
        allow_abbrev=False,
        **options,
    )


def add_dry_run(parser: ArgumentParser) -> None:
    """Add the flag ``--dry_run``."""
    words = "say what would be done, its sizes and about how long it takes here; train and write nothing"
    parser.add_argument("--dry_run", action="store_true", default=SUPPRESS, help=words)


def add_print_config(parser: ArgumentParser) -> None:
    """Add ``--print_config`` to a parser made with ``print_config=None``, whose settings are not all flags."""
    words = "print the settings after applying all other arguments, for --config to read, and exit"
    parser.add_argument("--print_config", action="store_true", default=SUPPRESS, help=words)


def print_settings(values: Mapping[str, Any]) -> None:
    """Print settings as ``--config`` reads them."""
    print(yaml.safe_dump(dict(values), sort_keys=False, allow_unicode=True), end="")


def without_looking(arguments: Sequence[str]) -> list[str]:
    """Arguments without those that show something and exit, to find out first what they are to show."""
    return [a for a in arguments if a not in ("-h", "--help") and not a.startswith("--print_config")]


def underscored(arguments: Sequence[str]) -> list[str]:
    """Flags with underscores for hyphens, ``--learning_rate`` for ``--learning-rate``; values stay as they are."""
    flag = re.compile(r"--\w[\w.-]*\+?(?==|$)")
    return [
        "--" + match[0][2:].replace("-", "_") + argument[match.end() :] if (match := flag.match(argument)) else argument
        for argument in arguments
    ]


def describe(error: Exception) -> str:
    """An error of the user in one line."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    text = " ".join(str(error).split())
    if isinstance(error, ArgumentError):
        text = re.sub(r'^Parser key "([^"]+)":? ?', r"\1: ", text)
        text = re.sub(r"<class '(\w+)'>", r"\1", text)
        text = re.sub(r"typing\.Literal\[([^]]*)\]", r"one of \1", text)
        text = re.sub(r": Expected an? (.*?)\. Got value: (.*)", r" must be \1, got \2", text)
    return text


def check_folder(output: object, file: str | None) -> str | None:
    """The folder that a study's file names, if it names one; a ValueError if that is no text."""
    if output is not None and not isinstance(output, str):
        raise ValueError(f"{file}: output must be a folder, got {output!r}")
    return output
