"""Argument parsers that raise errors instead of exiting, and the texts of such errors."""

import argparse
import errno
import os
import re
from argparse import SUPPRESS, ArgumentError
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from torchdsc.lab.schema import did_you_mean

__all__ = ["SUPPRESS", "ArgumentError", "ArgumentParser", "describe", "existing", "underscored"]

_UNKNOWN = re.compile(r"unrecognized arguments: (--[\w.]+)")
_INVALID = re.compile(r"argument (\S+): invalid (\w+) value: (.*)")
_KINDS = {"int": "an integer", "float": "a number"}


class ArgumentParser(argparse.ArgumentParser):
    """A parser of a command that raises ``ArgumentError`` where argparse exits, and suggests known flags."""

    def __init__(self, command: str, description: str, **options: Any) -> None:
        super().__init__(
            prog=f"torchdsc {command}",
            description=description,
            formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=34, width=110),
            exit_on_error=False,
            allow_abbrev=False,
            **options,
        )

    def add_base(self) -> None:
        """Add ``--base``, for commands that load an adapter."""
        self.add_argument("--base", help="base model of an adapter: folder or hub id (default: the one it names)")

    def error(self, message: str) -> NoReturn:
        """Raise ``ArgumentError``, with the guess."""
        unknown = _UNKNOWN.match(message)
        if unknown:
            known = [flag for action in self._actions for flag in action.option_strings]
            message += did_you_mean(unknown[1], known)
        raise ArgumentError(None, message)

    def parse_args(self, arguments: Sequence[str]) -> argparse.Namespace:  # type: ignore[override]
        """The options; what is not given and has no default is not among them."""
        options, rest = self.parse_known_args(arguments)
        if rest:
            self.error(f"unrecognized arguments: {' '.join(rest)}")
        return options


def existing(path: str) -> Path:
    """A path that must be there, told before anything slow is loaded."""
    if not Path(path).exists():
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
    return Path(path)


def underscored(arguments: Sequence[str]) -> list[str]:
    """Flags with underscores for hyphens, ``--learning_rate`` for ``--learning-rate``; values stay as they are."""
    flag = re.compile(r"--\w[\w.-]*(?==|$)")
    return [
        "--" + match[0][2:].replace("-", "_") + argument[match.end() :] if (match := flag.match(argument)) else argument
        for argument in arguments
    ]


def describe(error: Exception) -> str:
    """An error of the user in one line."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    text = " ".join(str(error).split())
    invalid = _INVALID.fullmatch(text)
    if invalid:
        return f"{invalid[1]} must be {_KINDS.get(invalid[2], invalid[2])}, got {invalid[3]}"
    return text
