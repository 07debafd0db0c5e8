"""Parsers that raise their errors, and the words for them."""

import re
from argparse import ArgumentError

try:
    from jsonargparse import ArgumentParser
except ImportError as error:
    raise ImportError("the command line needs jsonargparse: pip install 'torchdsc[lab]'") from error

__all__ = ["ArgumentError", "ArgumentParser", "command_parser", "describe"]


def command_parser(command: str, description: str, usage: str | None = None) -> ArgumentParser:
    """A parser that raises ``ArgumentError`` where it would print its usage and exit.

    Args:
        command: Name of the command.
        description: Its line of help.
        usage: What follows the program's name, where the generated line is too long.
    """
    program = f"torchdsc {command}"
    return ArgumentParser(
        prog=program, description=description, usage=usage and f"{program} {usage}", exit_on_error=False
    )


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
