"""``torchdsc report``."""

from pathlib import Path

from .parsing import ArgumentParser, existing


def run(arguments: list[str]) -> int:
    """Write an experiment's table and report anew, from its records alone."""
    parser = ArgumentParser("report", "Write an experiment's table and report anew, from its results.json alone.")
    parser.add_argument("folder", type=existing, help="folder of an experiment")
    parser.add_argument("--output", type=Path, help="where to write (default: the same folder)")
    options = parser.parse_args(arguments)
    from torchdsc.lab.experiment.findings import headline
    from torchdsc.lab.experiment.report import write_report
    from torchdsc.lab.experiment.results import Results
    from torchdsc.lab.experiment.tables import write_table

    results, folder = Results.read(options.folder), options.output or options.folder
    print("\n".join(headline(results, write_table(results, folder))))
    print(f"report: {write_report(results, folder)}")
    return 0
