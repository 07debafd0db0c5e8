"""``torchdsc bench``."""

import sys
import tomllib
from importlib import import_module
from pathlib import Path
from typing import Any

from .parsing import SUPPRESS, ArgumentParser


def run(arguments: list[str]) -> int:
    """Run the checkout's benchmarks."""
    parser = ArgumentParser("bench", "Time what is compared in this checkout, after its tests.")
    parser.add_argument("names", nargs="*", default=SUPPRESS, help=f"{_known()}; or `page`, which writes their page")
    parser.add_argument("--rounds", type=int, default=SUPPRESS, help="rounds of a point (default: as time allows)")
    parser.add_argument("--output", type=str, default=SUPPRESS, help="folder of the JSON (default: the results)")
    parser.add_argument("--base", type=str, default=SUPPRESS, help="commit to compare the library with")
    parser.add_argument("--quick", action="store_true", help="a few small points, into runs/bench-quick")
    options = vars(parser.parse_args(arguments))
    suite = _import("benchmarks.suite")
    for name in options.get("names", []):
        if name != suite.PAGE:
            suite.check_name(name)
    command = _import("benchmarks.command")
    output = options.get("output")
    command.run(
        command.Options(
            names=options.get("names", []),
            rounds=options.get("rounds"),
            output=Path(output) if output else None,
            base=options.get("base"),
            quick=options["quick"],
        )
    )
    return 0


def _known() -> str:
    """Which benchmarks there are, in the words of the help; only a checkout has them."""
    try:
        return f"any of {', '.join(_import('benchmarks.suite').NAMES)} (default: the usual ones)"
    except (ImportError, FileNotFoundError):
        return "benchmarks, which a checkout lists here (default: the usual ones)"


def _import(name: str) -> Any:
    """A module of the checkout."""
    folder = str(find_checkout())
    if folder not in sys.path:
        sys.path.insert(0, folder)
    return import_module(name)


def find_checkout() -> Path:
    """The checkout that the current folder is in, or the one that this package runs from.

    Raises:
        FileNotFoundError: If there is neither: an installed package has no benchmarks and no tests.
    """
    here = Path.cwd()
    for folder in (here, *here.parents, Path(__file__).resolve().parents[3]):
        if _is_checkout(folder):
            return folder
    raise FileNotFoundError("benchmarks need a checkout of torchdsc: run this command inside one")


def _is_checkout(folder: Path) -> bool:
    project = folder / "pyproject.toml"
    if not (project.is_file() and (folder / "benchmarks" / "command.py").is_file()):
        return False
    # Another project may well have a folder of this name.
    name: object = tomllib.loads(project.read_text(encoding="utf-8")).get("project", {}).get("name")
    return name == "torchdsc"
