"""Runs benchmarks by name: first the tests of what they time, then the measurement; its JSON is whole or absent."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from torchdsc.lab.files import write_text
from torchdsc.lab.training.environment import command_line

from . import base, runner
from .case import Benchmark, Settings
from .child import ROOT, imported_source
from .suite import NAMES, PAGE, load
from .tables import comparison_lines, result_lines

RESULTS = ROOT / "benchmarks" / "results"
# Results that say nothing but that everything runs: never among the committed ones.
QUICK_RESULTS = Path("runs") / "bench-quick"
# What auto takes follows from a measurement: not a condition for making it.
_CHOICE = "tests/ops/compose/test_crossover.py"


@dataclass(frozen=True)
class Options:
    """What the command line says.

    Attributes:
        names: Benchmarks; every usual one by default.
        rounds: Rounds of each point; by default as many as fit a few seconds.
        output: Folder of the JSON; by default the committed results, or ``runs/bench-quick`` with ``quick``.
        base: Commit to compare with.
        quick: A few small points.
    """

    names: Sequence[str] = ()
    rounds: int | None = None
    output: Path | None = None
    base: str | None = None
    quick: bool = False


def run(options: Options) -> None:
    """Run benchmarks, or write their page.

    A benchmark whose tests fail is not timed, and the others are.

    Raises:
        ValueError: If a name is unknown, ``rounds`` is below 2, ``base`` is no commit, or the page comes with options.
        ChildProcessError: If the tests of a benchmark failed.
    """
    if list(options.names) == [PAGE]:
        _write_page(options)
        return
    benchmarks = [load(name) for name in options.names or usual()]
    if options.rounds is not None and options.rounds < 2:
        raise ValueError(f"rounds must be >= 2, got {options.rounds}")
    settings = Settings("cuda" if torch.cuda.is_available() else "cpu", options.quick)
    output = options.output or (QUICK_RESULTS if options.quick else RESULTS)
    passed: dict[str, bool] = {}
    refused = []
    for benchmark in benchmarks:
        with _progress() as progress:
            if not _tested(benchmark, passed, progress):
                refused.append(benchmark.name)
                continue
            path, result = _measure(benchmark, options, settings, output, progress)
        lines = comparison_lines(result) if options.base else result_lines(result)
        print("\n".join([*lines, "", f"written: {path}"]), flush=True)
    if refused:
        raise ChildProcessError(f"not timed, because their tests fail: {', '.join(refused)}")


def _write_page(options: Options) -> None:
    from .page import write

    given = [f"--{f.name}" for f in fields(Options) if f.name != "names" and getattr(options, f.name) != f.default]
    if given:
        raise ValueError(f"{PAGE} must stand without options, as nothing is measured for it, got {', '.join(given)}")
    write(RESULTS, ROOT / "docs")


def usual() -> list[str]:
    """Names of the benchmarks that run where none is named."""
    return [name for name in NAMES if load(name).usual]


def _measure(
    benchmark: Benchmark, options: Options, settings: Settings, output: Path, progress: Callable[[str], None]
) -> tuple[Path, dict[str, Any]]:
    shared: dict[str, Any] = {"rounds": options.rounds, "command": command_line()}
    name = result_name(benchmark.name, settings.device)
    if options.base:
        path = output / f"compare-{name}"
        result = base.compare(benchmark.name, options.base, settings, progress=progress, **shared)
    else:
        path = output / name
        shared["progress"] = lambda text: progress(f"{benchmark.name}, {text}")
        result = runner.run(benchmark, settings, **shared)
    # Only now: whatever ends the measurement leaves the result of the one before.
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(result, indent=1) + "\n")
    if benchmark.publish is not None and not options.base and path.parent.resolve() == RESULTS:
        benchmark.publish(result)
    return path, result


def result_name(benchmark: str, device: str) -> str:
    """File of a result: that of a GPU stands beside that of a CPU."""
    return f"{benchmark}.json" if device == "cpu" else f"{benchmark}-{device}.json"


def _tested(benchmark: Benchmark, passed: dict[str, bool], progress: Callable[[str], None]) -> bool:
    """Run the tests of a benchmark, those that ran for another one left out."""
    for path in benchmark.tests:
        if path not in passed:
            progress(f"{benchmark.name}: {path} before anything is timed")
            passed[path] = run_tests(path)
    return all(passed[path] for path in benchmark.tests)


def run_tests(path: str) -> bool:
    """Whether the tests under a path of this checkout pass, against the torchdsc imported here."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", path, "-m", "not slow", "--deselect", _CHOICE, "-p", "no:cacheprovider"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(imported_source()), os.environ.get("PYTHONPATH", "")])},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if done.returncode:
        print(done.stdout[-6000:], file=sys.stderr)
    return done.returncode == 0


@contextmanager
def _progress() -> Iterator[Callable[[str], None]]:
    """A line on standard error that says what is being measured, and for how long."""
    columns = SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn()
    # Not redirected: what a benchmark prints stays on standard output.
    with Progress(*columns, console=Console(stderr=True), transient=True, redirect_stdout=False) as bar:
        task = bar.add_task("starting", total=None)
        yield lambda text: bar.update(task, description=text)
