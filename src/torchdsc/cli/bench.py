"""``torchdsc bench``."""

import sys
import tomllib
from importlib import import_module
from pathlib import Path

from .parsing import command_parser


def run(arguments: list[str]) -> None:
    """Run the checkout's benchmarks."""
    usage = "[NAMES ...] [--rounds N] [--output FOLDER] [--base COMMIT] [--quick]"
    parser = command_parser("bench", "Time what is compared in this checkout, after its tests.", usage)
    parser.add_argument("names", nargs="*", help="benchmarks (default: the usual ones), or `page` for their page")
    parser.add_argument("--rounds", type=int, default=None, help="rounds of a point (default: as time allows)")
    parser.add_argument("--output", type=str | None, default=None, help="folder of the JSON (default: the results)")
    parser.add_argument("--base", type=str | None, default=None, help="commit to compare the library with")
    parser.add_argument("--quick", action="store_true", help="a few small points, into runs/bench-quick")
    options = parser.parse_args(arguments)
    folder = str(find_checkout())
    if folder not in sys.path:
        sys.path.insert(0, folder)
    command = import_module("benchmarks.command")
    command.run(
        command.Options(
            names=options.names,
            rounds=options.rounds,
            output=Path(options.output) if options.output else None,
            base=options.base,
            quick=options.quick,
        )
    )


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
