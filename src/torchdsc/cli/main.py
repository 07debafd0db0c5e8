"""Entry point of ``torchdsc``: dispatches to a command, and turns errors of the user into a line."""

import os
import sys
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from importlib import import_module

# Command, the module that runs it (imported only when called), and its line of help.
_COMMANDS = {
    "run": ("torchdsc.cli.run", "run an experiment, or what is left of it, and write its report"),
    "report": ("torchdsc.cli.report", "write an experiment's report anew, from its records alone"),
    "presets": ("torchdsc.cli.presets", "list the experiments that come with the package"),
    "budget": ("torchdsc.cli.budget", "solve the widths of each method for a parameter budget"),
    "inspect": ("torchdsc.cli.inspect", "say what state a saved model or adapter is in, with a page of pictures"),
    "generate": ("torchdsc.cli.generate", "generate text with a trained model"),
    "serve": ("torchdsc.cli.serve", "serve a saved model or adapter over an OpenAI-compatible endpoint"),
    "bench": ("torchdsc.cli.bench", "time the library against its baselines, in a checkout"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``torchdsc COMMAND ...``.

    Args:
        arguments: Command line without the program's name; ``sys.argv`` by default.

    Returns:
        Exit status: 0, 1 when interrupted or where a run failed, 2 on an error of the user.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_usage())
        return 0 if arguments else 2
    if arguments[0] == "--version":
        from torchdsc import __version__

        print(f"torchdsc {__version__}")
        return 0
    if arguments[0] not in _COMMANDS:
        near = "".join(f" (did you mean {name}?)" for name in get_close_matches(arguments[0], _COMMANDS, n=1))
        print(f"torchdsc: command must be one of {', '.join(_COMMANDS)}, got {arguments[0]!r}{near}", file=sys.stderr)
        return 2
    return _run(arguments[0], arguments[1:])


def _run(command: str, arguments: list[str]) -> int:
    if not sys.stderr.isatty():
        # Downloads of data sets, which would draw their bars into a log.
        os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    try:
        # First, because its error names the extra to install.
        import_module("torchdsc.lab")
        from .parsing import ArgumentError, describe, underscored
    except ImportError as error:
        print(f"torchdsc {command}: {error}", file=sys.stderr)
        return 2
    try:
        run: Callable[[list[str]], int] = import_module(_COMMANDS[command][0]).run
        status = run(underscored(arguments))
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader of the pipe, such as head, has closed it: drop the rest of the output.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        further = "; the same command goes on from what is saved" if command == "run" else ""
        print(f"\ntorchdsc {command}: interrupted{further}", file=sys.stderr)
        return 1
    except ArgumentError as error:
        print(f"torchdsc {command}: {describe(error)} (see torchdsc {command} --help)", file=sys.stderr)
        return 2
    except (ValueError, OSError, ImportError) as error:
        print(f"torchdsc {command}: {describe(error)}", file=sys.stderr)
        return 2
    return status


def _usage() -> str:
    lines = [f"  {name:<10}{help_line}" for name, (_, help_line) in _COMMANDS.items()]
    ending = "`torchdsc COMMAND --help` explains a command; `torchdsc --version` prints the version."
    return "\n".join(["usage: torchdsc COMMAND [options]", "", *lines, "", ending])
