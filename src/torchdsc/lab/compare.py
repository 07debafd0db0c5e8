"""The main job: methods and seeds trained at equal budgets, and compared in a table, pictures and a report."""

import gc
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from rich.console import Console

from torchdsc.models import DSCGPTForCausalLM

from .budget import Plan, describe_misses
from .checkpoints import checkpoint_step
from .config import ExperimentConfig
from .dry_run import Work, duration, measure_cost, print_work
from .environment import hardware, quiet_transformers
from .experiment import look, prepare
from .files import read_json, write_json, write_text
from .latency import Timing, measure_in_turn
from .loading import load_model
from .report import write_report
from .tables import print_table, summarize, to_markdown
from .tokens import FixedWindows
from .training import MODEL, RECORD, Data, train_run

__all__ = ["compare", "dry_run", "write_results"]

RESULTS, REPORT, TABLE = "results.json", "report.html", "table.md"
_LATENCY = "latency.json"


def compare(config: ExperimentConfig, folder: Path, *, console: Console | None = None) -> list[dict[str, Any]]:
    """Run an experiment, or what is left of it, and write its results.

    ``folder`` ends with ``config.yaml``, one folder a run, ``results.json``, ``table.md`` and ``report.html``. Runs
    that are there already are kept, latencies too; one that was interrupted goes on from its last checkpoint.

    Args:
        config: The experiment.
        folder: The experiment's own folder.
        console: Where to print.

    Returns:
        The records of all runs. One that diverged stops, and the others go on: see :func:`train_run`.

    Raises:
        ValueError: If ``folder`` holds another experiment or other files, the corpus is unusable or has changed since,
            or a budget is infeasible.
        OSError: If ``folder`` cannot be written.
    """
    console = console or Console()
    console.print(f"corpus {config.corpus}: reading, and encoding what is new", highlight=False, soft_wrap=True)
    data, plans = prepare(config, folder)
    _print_plans(console, config, data, plans)
    runs = _train_all(config, data, plans, folder, console)
    with quiet_transformers():
        latency = _latency(config, data, folder, runs)
    runs = [{**run, "latency_ms": latency[run["method"]]} for run in runs]
    write_results(runs, folder)
    print_table(summarize(runs), console)
    console.print(f"report: {folder / REPORT}", highlight=False, soft_wrap=True)
    return runs


def dry_run(config: ExperimentConfig, folder: Path, *, console: Console | None = None) -> None:
    """Print what :func:`compare` would do: plans, sizes, and about how long it takes; ``folder`` is left as it is.

    The corpus is read, and encoded into the cache; a few steps of each method are timed.

    Args:
        config: The experiment.
        folder: The experiment's folder, in which some runs may be done.
        console: Where to print.

    Raises:
        ValueError: As :func:`compare`.
    """
    console = console or Console()
    console.print(f"corpus {config.corpus}: reading, and encoding what is new", highlight=False, soft_wrap=True)
    data, plans = look(config, folder)
    _print_plans(console, config, data, plans)
    works = []
    for method, plan in plans.items():
        places = [folder / f"{method}-seed{seed}" for seed in config.seeds]
        todo = [config.steps - _steps_done(place, config.steps) for place in places]
        cost = measure_cost(config, plan, data) if any(todo) else None
        seconds = sum(cost.seconds(config, steps, test=True) for steps in todo if steps and cost)
        works.append(Work(method, len(todo), todo.count(0), seconds))
    print_work(console, works, folder)


def write_results(runs: list[dict[str, Any]], folder: Path) -> None:
    """Write ``results.json``, ``table.md`` and ``report.html``."""
    write_json(folder / RESULTS, {"format": 1, "runs": runs})
    write_text(folder / TABLE, to_markdown(summarize(runs)))
    write_report(runs, folder)


def _train_all(
    config: ExperimentConfig, data: Data, plans: dict[str, Plan], folder: Path, console: Console
) -> list[dict[str, Any]]:
    pairs = [(method, seed) for seed in config.seeds for method in config.methods]
    places = [folder / f"{method}-seed{seed}" for method, seed in pairs]
    todo = [config.steps - _steps_done(place, config.steps) for place in places]
    pace, runs = _Pace(), []
    for index, (method, seed) in enumerate(pairs):
        done = config.steps - todo[index]
        state = "training" if done == 0 else f"going on from step {done}" if todo[index] else "done before"
        left = pace.left([(m, steps) for (m, _), steps in zip(pairs[index:], todo[index:], strict=True)])
        console.print(
            f"[bold]run {index + 1} of {len(pairs)}[/]: {method}, seed {seed} ({state}){left}", highlight=False
        )
        started = time.perf_counter()
        runs.append(train_run(config, plans[method], seed, data, places[index]))
        pace.add(method, time.perf_counter() - started, todo[index])
        gc.collect()
    return runs


def _steps_done(place: Path, steps: int) -> int:
    return steps if (place / RECORD).is_file() else checkpoint_step(place)


class _Pace:
    """Seconds that a step of each method took in this call, evaluations and checkpoints included."""

    def __init__(self) -> None:
        self._seconds: dict[str, list[float]] = {}

    def add(self, method: str, seconds: float, steps: int) -> None:
        """Note a run that did ``steps`` steps; none where it was done or trained before."""
        if steps:
            self._seconds.setdefault(method, []).append(seconds / steps)

    def left(self, todo: Sequence[tuple[str, int]]) -> str:
        """What the runs still to do will take, in words; nothing before a run has been seen."""
        if not self._seconds or not any(steps for _, steps in todo):
            return ""
        means = {method: fmean(seconds) for method, seconds in self._seconds.items()}
        # A method not seen yet is taken for the average of those that were.
        seconds = sum(steps * means.get(method, fmean(means.values())) for method, steps in todo)
        return f"; about {duration(seconds)} left for all runs"


def _latency(
    config: ExperimentConfig, data: Data, folder: Path, runs: list[dict[str, Any]]
) -> dict[str, dict[str, Any]]:
    """Forward pass of one evaluation batch through each method's first model, in turn; measured once.

    A method all of whose runs diverged has no model, and NaN for latency.
    """
    file = folder / _LATENCY
    if file.is_file():
        kept = read_json(file, keys=config.methods)
        for method in config.methods:
            if not isinstance(kept[method], dict) or not {"median", "q1", "q3"} <= set(kept[method]):
                raise ValueError(f"{file} is damaged: it lacks quartiles of {method}; delete it to make it anew")
        return kept
    whole = {run["method"]: run["seed"] for run in reversed(runs) if math.isfinite(run["val_loss_final"])}
    windows = FixedWindows(data.tokens.valid, config.window)
    batch = torch.stack([windows[i % len(windows)]["input_ids"] for i in range(config.eval_batch_size)])
    device = "cuda" if torch.cuda.is_available() else "cpu"

    def forward(method: str) -> Callable[[], object]:
        path = folder / f"{method}-seed{whole[method]}" / MODEL
        model: Any = load_model(DSCGPTForCausalLM, path).eval()
        model.to(device)
        inputs = batch.to(device)

        @torch.inference_mode()
        def call() -> object:
            return model(inputs, use_cache=False)

        return call

    timings = measure_in_turn(
        {method: forward(method) for method in config.methods if method in whole}, rounds=config.latency_rounds
    )
    untimed = Timing(math.nan, math.nan, math.nan, [])
    shared = {"batch": list(batch.shape), "hardware": hardware()}
    measured = {
        method: {"median": t.median, "q1": t.q1, "q3": t.q3, **shared, "samples": t.samples}
        for method in config.methods
        for t in [timings.get(method, untimed)]
    }
    write_json(file, measured)
    return measured


def _print_plans(console: Console, config: ExperimentConfig, data: Data, plans: dict[str, Plan]) -> None:
    tokens = ", ".join(f"{len(getattr(data.tokens, split)):,} {split}" for split in ("train", "valid", "test"))
    console.print(f"tokens: {tokens}; {data.tokens.vocab_size:,} different", highlight=False)
    for method, plan in plans.items():
        console.print(f"{method}: {plan}", highlight=False, soft_wrap=True)
    for line in describe_misses(plans, config.budget(data.vocab_size), config.match):
        console.print(f"warning: {line}", markup=False, highlight=False, soft_wrap=True)
