"""Runs an experiment, or what is left of it: a queue of runs that several processes may share."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from accelerate.utils.environment import get_int_from_env
from rich.console import Console
from rich.table import Table
from rich.text import Text

from torchdsc.lab.files import locked, new_folder, read_json, remove_drafts, write_json, write_text
from torchdsc.lab.schema import SettingsError, build, read_yaml
from torchdsc.lab.tasks.task import Task
from torchdsc.lab.training.checkpoints import checkpoint_step
from torchdsc.lab.training.environment import (
    hardware,
    peak_memory_bytes,
    quiet_transformers,
    reset_peak_memory,
)
from torchdsc.lab.training.latency import measure_in_turn

from .config import Experiment, Job
from .findings import headline
from .intervals import format_interval, format_mean
from .queue import Queue
from .report import write_report
from .results import CONFIG, Results, choose
from .summary import Row
from .tables import write_table
from .words import duration

__all__ = ["dry_run", "run"]

DATA = "data.json"
# Environment variables by which launchers such as torchrun and mpirun tell the number of processes.
_WORLD = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")


def run(experiment: Experiment, folder: Path, *, console: Console | None = None) -> Results:
    """Run an experiment, or what is left of it, and write its results.

    ``folder`` ends with ``config.yaml``, ``data.json`` (hashes of the data), one folder a run, ``results.json``,
    ``table.md`` and ``report.html``. What is there is kept: finished runs, also those of which ``results.json`` alone
    tells; one that was interrupted goes on from its last checkpoint. The folder's experiment may be a larger one than
    this, and grows by the seeds, cases, variants and trials that this one has beside. Processes that are given the same
    folder share the work. A run that fails is recorded with its error, and the rest goes on; a later call tries it
    again.

    Args:
        experiment: What to run.
        folder: Its own folder.
        console: Where to print.

    Returns:
        The results of all that the folder holds.

    Raises:
        SettingsError: If a run's settings do not fit, as where a budget is infeasible, or ``folder`` holds an
            experiment that differs in more than its size.
        ValueError: If ``folder`` holds other files, a record there is damaged, data cannot be used or have changed
            since the experiment began, or several processes were launched together.
        OSError: If a file cannot be read or written.
    """
    _refuse_launch()
    console = console or Console()
    task = _prepare(experiment, console)
    whole = _take_folder(experiment, task, folder)
    queue = Queue(whole, task, folder, partial(_say, console))
    # What is asked for here, with all trials that are known of it.
    part = whole.part([v.name for v in experiment.variants], list(experiment.cases))
    trials = queue.do(list(part.trial_jobs()))
    seeds = {v.name: v.seeds or experiment.seeds for v in experiment.variants}
    chosen = choose(part, trials, task.measure)
    queue.do([job for job in part.run_jobs(chosen) if job.seed in seeds[job.variant]])
    with locked(folder / ".lock", wait=True):
        results = queue.results()
        with quiet_transformers():
            results.timing.update(_timing(results, task, folder))
        results.write(folder)
        rows = write_table(results, folder)
        write_report(results, folder)
    _print_results(console, results, rows, folder)
    return results


def dry_run(experiment: Experiment, folder: Path, *, console: Console | None = None) -> None:
    """Print what :func:`run` would do: sizes, and about how long it takes; ``folder`` is left as it is.

    Data are loaded, and encoded into the cache; a few steps of each variant, as its first trial has it, are timed.

    Args:
        experiment: What to run.
        folder: Its own folder, in which some runs may be done.
        console: Where to print.

    Raises:
        ValueError: As :func:`run`.
        OSError: If a file cannot be read.
    """
    console = console or Console()
    _whole(experiment, folder)
    task = _prepare(experiment, console)
    queue = Queue(experiment, task, folder, partial(_say, console))
    total = 0.0
    for variant in experiment.variants:
        jobs = [[job] for job in experiment.trial_jobs() if job.variant == variant.name]
        # Which trial a run is to be like is not known before they are done.
        alike: dict[tuple[str, int], list[Job]] = {}
        for job in experiment.possible_jobs():
            if job.variant == variant.name and not job.is_trial:
                alike.setdefault((job.case, job.seed), []).append(job)
        jobs += alike.values()
        todo = [same[0] for same in jobs if not any(queue.record(job) for job in same)]
        seconds = 0.0
        measured: dict[str, float] = {}
        for job in todo:
            settings = experiment.settings_of(job)
            is_trial = experiment.leaves_test_alone(job)
            key = settings.model_dump_json() + str(is_trial)
            if key not in measured:
                measured[key] = task.seconds(settings, is_trial=is_trial)
            done = checkpoint_step(folder / job.name)
            seconds += measured[key] * (1 - done / settings.steps)
        total += seconds
        before = f", {len(jobs) - len(todo)} of them done before" if len(todo) < len(jobs) else ""
        left = f": about {duration(seconds)}" if todo else ""
        _say(console, f"{variant.name}: {len(jobs)} run{'s' if len(jobs) != 1 else ''}{before}{left}")
    in_all = f"in all about {duration(total)} on this machine as it is now" if total else "nothing is left to train"
    _say(console, f"{in_all}; a dry run: {folder} is left as it is")


def _prepare(experiment: Experiment, console: Console) -> Task[Any]:
    """The task, its data loaded, and every run's model found possible; prints a line for each."""
    task: Task[Any] = Results(experiment).task()
    _say(console, "data: reading, and encoding what is new")
    described: dict[str, str] = {}
    for job in experiment.possible_jobs():
        settings = experiment.settings_of(job)
        task.data(settings)
        try:
            described.setdefault(job.variant, task.describe(settings))
        except (TypeError, ValueError) as error:
            raise SettingsError(f"settings of variant {job.variant!r}: {error}") from error
    for name, words in described.items():
        _say(console, f"{name}: {words}")
    return task


def _whole(experiment: Experiment, folder: Path) -> Experiment:
    """The experiment that the folder holds, with what this one has beside; this one where it holds none.

    Raises:
        SettingsError: If it holds another one.
        ValueError: If it holds other files.
    """
    file = folder / CONFIG
    if not file.is_file():
        if folder.exists() and (not folder.is_dir() or any(not path.name.startswith(".") for path in folder.iterdir())):
            raise ValueError(f"output must be a new or empty folder, or an experiment's, got {folder} with other files")
        return experiment
    kept = build(Experiment, read_yaml(file), str(file))
    try:
        return kept.extended_by(experiment)
    except SettingsError as error:
        raise SettingsError(f"output {folder} holds {error}: choose another folder, or delete this one") from error


def _take_folder(experiment: Experiment, task: Task[Any], folder: Path) -> Experiment:
    """Make the folder that of the experiment; returns all that it then holds."""
    _whole(experiment, folder)
    with new_folder(folder), locked(folder / ".lock", wait=True):
        remove_drafts(folder)
        # Another process may have come before.
        whole = _whole(experiment, folder)
        hashes: dict[str, str] = {}
        for job in experiment.possible_jobs():
            hashes |= task.data(experiment.settings_of(job))
        known = read_json(folder / DATA) if (folder / DATA).is_file() else {}
        changed = [name for name, sha256 in hashes.items() if known.get(name, sha256) != sha256]
        if changed:
            raise ValueError(
                f"{changed[0]} must hold what it held when the experiment in {folder} began, got something else: "
                "bring that back, or choose another folder"
            )
        write_text(folder / CONFIG, yaml.safe_dump(whole.model_dump(), sort_keys=False, allow_unicode=True))
        write_json(folder / DATA, {**known, **hashes})
    return whole


def _timing(results: Results, task: Task[Any], folder: Path) -> dict[str, dict[str, Any] | None]:
    """Timings of all variants in turn: those that are there, or new ones of all where one is not there yet."""
    calls = {}
    for variant in results.experiment.variants:
        whole = [run for run in results.runs_of(variant.name) if math.isfinite(run[task.measure.key])]
        if whole:
            job = Job(**{name: whole[0][name] for name in ("variant", "trial", "case", "seed", "is_trial")})
            timed = task.timed(results.experiment.settings_of(job), folder / job.name)
            if timed is not None:
                calls[variant.name] = timed
    if all(results.timing.get(name) for name in calls):
        return {}
    peaks = {name: _peak(timed.call) for name, timed in calls.items()}
    rounds = results.experiment.timing_rounds
    timings = measure_in_turn({name: timed.call for name, timed in calls.items()}, rounds=rounds)
    return {
        **dict.fromkeys(results.timing),
        **{
            name: {
                "median": timing.median,
                "q1": timing.q1,
                "q3": timing.q3,
                "samples": timing.samples,
                "peak_memory_bytes": peaks[name],
                "batch": list(calls[name].batch),
                "hardware": hardware(),
            }
            for name, timing in timings.items()
        },
    }


def _peak(call: Callable[[], object]) -> int:
    # The first makes an optimizer's state, where there is one.
    call()
    reset_peak_memory()
    call()
    return peak_memory_bytes()


def _refuse_launch() -> None:
    """Refuse a launch of several processes, which would wait for each other while one of them has a run's lock."""
    world = get_int_from_env(_WORLD, 1)
    if world > 1:
        raise ValueError(
            f"an experiment takes processes that are started one by one, got a launch of {world}: "
            "start the same command several times, and they share its runs"
        )


def _print_results(console: Console, results: Results, rows: Sequence[Row], folder: Path) -> None:
    """What decides, and where the rest is."""
    measure = results.measure
    shown = Table("variant", "size", measure.name, "difference (95 %)", "verdict", box=None, pad_edge=False)
    for row in rows:
        values = [value for by_seed in row.values.values() for value in by_seed.values()]
        mean = format_mean(values, measure.decimals) if len(row.values) == 1 else f"{row.mean:.{measure.decimals}f}"
        differences = [f"{format_interval(c.difference, measure.decimals)} to {c.other}" for c in row.comparisons]
        verdicts = "\n".join(c.verdict for c in row.comparisons)
        shown.add_row(*map(Text, (row.name, f"{row.size:,}", mean, "\n".join(differences), verdicts)))
    if rows:
        console.print(shown)
    for sentence in headline(results, rows):
        _say(console, sentence)
    if results.failed:
        names = ", ".join(f"{record['variant']} (seed {record['seed']})" for record in results.failed)
        _say(console, f"failed: {names}; the same command tries them again")
    _say(console, f"report: {folder / 'report.html'}")


def _say(console: Console, line: str) -> None:
    console.print(line, markup=False, highlight=False, soft_wrap=True)
