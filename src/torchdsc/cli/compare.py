"""``torchdsc compare``."""

from pathlib import Path

from .options import experiment_parser, parse_experiment
from .parsing import SUPPRESS, add_dry_run


def run(arguments: list[str]) -> None:
    """Train methods at equal budgets and compare them."""
    parser = experiment_parser("compare", "Train methods at equal parameter budgets and compare them.", "quick")
    parser.add_argument("--output", type=str, default=SUPPRESS, help="folder of the experiment (default: runs/PRESET)")
    add_dry_run(parser)
    options, config = parse_experiment(parser, arguments)
    # Imported late: --help and wrong flags answer at once.
    from torchdsc.lab.compare import compare, dry_run

    (dry_run if options.get("dry_run") else compare)(config, Path(options.get("output") or f"runs/{options.preset}"))
