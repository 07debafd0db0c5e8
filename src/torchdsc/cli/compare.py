"""``torchdsc compare``."""

from pathlib import Path

from .options import experiment_parser, parse_experiment


def run(arguments: list[str]) -> None:
    """Train methods at equal budgets and compare them."""
    parser = experiment_parser("compare", "Train methods at equal parameter budgets and compare them.", "quick")
    parser.add_argument(
        "--output", type=str | None, default=None, help="folder of the experiment (default: runs/PRESET)"
    )
    options, config = parse_experiment(parser, arguments)
    # Imported late: --help and wrong flags answer at once.
    from torchdsc.lab.compare import compare

    compare(config, Path(options.output or f"runs/{options.preset}"))
