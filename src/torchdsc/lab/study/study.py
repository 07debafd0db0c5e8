"""A study: trials of every variant, runs as the best trial was, and a comparison. Processes may share its folder."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from torchdsc.lab.budget import Plan, describe_misses
from torchdsc.lab.config import ExperimentConfig
from torchdsc.lab.dry_run import Work, measure_cost, print_work
from torchdsc.lab.experiment import load_data
from torchdsc.lab.queue import (
    read_record,
    refuse_launch,
    refuse_shared_folders,
    share,
    take_folder,
    write_results,
)
from torchdsc.lab.schema import SettingsError
from torchdsc.lab.training import RECORD, Data, make_plans, train_run

from .config import StudyConfig, Variant
from .report import render_report
from .summary import to_markdown

__all__ = ["dry_run", "run_study"]

# What tables and reports are made from.
_FIELDS = {
    **dict.fromkeys(("description", "commit", "command"), str),
    **dict.fromkeys(("config", "corpus", "versions", "hardware"), dict),
    **dict.fromkeys(("params_total", "params_active", "seed", "steps"), int),
    "val_loss_final": int | float,
    "test_loss": int | float | None,
    "curve": list,
}


@dataclass(frozen=True)
class _Job:
    variant: Variant
    trial: int
    seed: int
    is_trial: bool

    @property
    def name(self) -> str:
        """Name of the run's folder."""
        settings = "-".join(f"{key} {value}" for key, value in _leaves(self.variant.trials[self.trial]))
        phase = "trial" if self.is_trial else "run"
        name = "-".join(part for part in (phase, self.variant.name, settings, f"seed{self.seed}") if part)
        return re.sub(r"[^\w.+-]+", "_", name)

    @property
    def description(self) -> str:
        """The run in words, which tell it apart from any other."""
        phase = "trial" if self.is_trial else "run"
        return f"{phase} of variant {self.variant.name!r} with {self.variant.trials[self.trial]}, seed {self.seed}"


def run_study(config: StudyConfig, folder: Path, *, console: Console | None = None) -> dict[str, Any]:
    """Run a study, or what is left of it, and write its results.

    ``folder`` ends with ``config.yaml``, ``data.json`` (the corpus' hash), one folder a run, ``results.json``,
    ``table.md`` and ``report.html``. Runs that are there are kept, and one that was interrupted goes on from its last
    checkpoint. Processes that are given the same folder share the work. Trials see the validation part alone; the test
    part is for the runs, and for them where ``config.test`` says so.

    Args:
        config: The study.
        folder: Its own folder.
        console: Where to print.

    Returns:
        What ``results.json`` holds: "config", "chosen", "trials" and "runs".

    Raises:
        SettingsError: If a budget is infeasible, or two runs would share a folder.
        ValueError: If ``folder`` holds another study, the corpus is unusable or has changed since the study began, or
            several processes were launched together.
        OSError: If ``folder`` cannot be written.
    """
    refuse_launch()
    console = console or Console()
    refuse_shared_folders((job.name, job.description) for job in _possible(config))
    data, _ = _look(config, console)
    take_folder(config.as_dict(), {f"corpus {_first(config).corpus}": data.corpus.sha256}, folder)

    def run(jobs: list[_Job]) -> list[dict[str, Any]]:
        return share(jobs, lambda job: _run(config, job, data, folder), lambda job: folder / job.name / RECORD, console)

    trials = run([_Job(v, index, config.tuning_seed, True) for v in config.variants for index in _tried(v)])
    chosen = {variant.name: _best(variant, trials) for variant in config.variants}
    runs = run([_Job(v, chosen[v.name], seed, False) for seed in config.seeds for v in config.variants])
    settings = {variant.name: variant.trials[chosen[variant.name]] for variant in config.variants}
    results = {"format": 1, "config": config.as_dict(), "chosen": settings, "trials": trials, "runs": runs}
    write_results(results, to_markdown(results), render_report(results), folder, console)
    return results


def dry_run(config: StudyConfig, folder: Path, *, console: Console | None = None) -> None:
    """Print what :func:`run_study` would do: plans, sizes, and about how long it takes; ``folder`` is left as it is.

    A few steps of each variant, as its first trial has it, are timed.

    Args:
        config: The study.
        folder: Its own folder, in which some runs may be done.
        console: Where to print.

    Raises:
        ValueError: As :func:`run_study`, but for what ``folder`` holds.
    """
    console = console or Console()
    data, plans = _look(config, console)
    works = []
    for variant in config.variants:
        jobs = [[_Job(variant, index, config.tuning_seed, True)] for index in _tried(variant)]
        # Which trial a run is to be like is not known before they are done.
        jobs += [[_Job(variant, i, seed, False) for i in range(len(variant.trials))] for seed in config.seeds]
        todo = [alike[0] for alike in jobs if not any((folder / job.name / RECORD).is_file() for job in alike)]
        experiments = [_experiment(config, job) for job in todo]
        cost = measure_cost(experiments[0], plans[variant.name], data) if todo else None
        seconds = sum(
            cost.seconds(experiment, experiment.steps, test=config.test and not job.is_trial)
            for job, experiment in zip(todo, experiments, strict=True)
            if cost
        )
        works.append(Work(variant.name, len(jobs), len(jobs) - len(todo), seconds))
    print_work(console, works, folder)


def _look(config: StudyConfig, console: Console) -> tuple[Data, dict[str, Plan]]:
    """The data, and plans of the variants as their first trials have them, which are printed."""
    data = load_data(_first(config))
    plans = {}
    for variant in config.variants:
        experiments = [
            config.experiment(variant, trial, config.tuning_seed, is_trial=False) for trial in variant.trials
        ]
        # Budgets that a trial cannot meet are refused before the first run.
        try:
            plan, *_ = [make_plans(experiment, data.vocab_size)[variant.method] for experiment in experiments]
        except ValueError as error:
            raise SettingsError(f"settings of variant {variant.name!r}: {error}") from error
        plans[variant.name] = plan
        console.print(f"{variant.name}: {plan}", markup=False, highlight=False, soft_wrap=True)
        budget = experiments[0].budget(data.vocab_size)
        for line in describe_misses({variant.name: plan}, budget, experiments[0].match):
            console.print(f"warning: {line}", markup=False, highlight=False, soft_wrap=True)
    return data, plans


def _experiment(config: StudyConfig, job: _Job) -> ExperimentConfig:
    return config.experiment(job.variant, job.variant.trials[job.trial], job.seed, is_trial=job.is_trial)


def _first(config: StudyConfig) -> ExperimentConfig:
    """Settings of the first variant: the data are the same for all."""
    variant = config.variants[0]
    return config.experiment(variant, variant.trials[0], config.tuning_seed, is_trial=False)


def _possible(config: StudyConfig) -> list[_Job]:
    """All trials, and all runs that the choice of a best trial may ask for."""
    return [
        *(_Job(v, index, config.tuning_seed, True) for v in config.variants for index in _tried(v)),
        *(
            _Job(v, index, seed, False)
            for v in config.variants
            for index in range(len(v.trials))
            for seed in config.seeds
        ),
    ]


def _tried(variant: Variant) -> range:
    return range(len(variant.trials) if len(variant.trials) > 1 else 0)


def _best(variant: Variant, trials: list[dict[str, Any]]) -> int:
    """The trial with the lowest final validation loss; one that diverged is the last to be chosen."""
    found = {trial["trial"]: trial["val_loss_final"] for trial in trials if trial["variant"] == variant.name}
    return min(found, key=lambda index: found[index] if math.isfinite(found[index]) else math.inf, default=0)


def _run(config: StudyConfig, job: _Job, data: Data, folder: Path) -> dict[str, Any]:
    experiment = _experiment(config, job)
    file = folder / job.name / RECORD
    if file.is_file():
        _check_record(read_record(file, _FIELDS), experiment, data, file)
    plan = make_plans(experiment, data.vocab_size)[job.variant.method]
    place = folder / job.name
    is_trial = job.is_trial or not config.test
    record = train_run(experiment, plan, job.seed, data, place, label=job.name, is_trial=is_trial)
    return {"variant": job.variant.name, "trial": job.trial, **record}


def _check_record(record: Mapping[str, Any], experiment: ExperimentConfig, data: Data, file: Path) -> None:
    """A record under a run's name must be that of this very run."""
    kept, wanted = record["config"], experiment.as_dict()
    different = [name for name in wanted if kept.get(name) != wanted[name]]
    if different or record["corpus"].get("sha256") != data.corpus.sha256:
        what = f"{different[0]} {kept.get(different[0])!r}" if different else "another corpus"
        raise ValueError(f"{file} must be a record of this study, got one of {what}: delete its folder to run it anew")


def _leaves(values: Mapping[str, Any]) -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for key, value in values.items():
        found += _leaves(value) if isinstance(value, Mapping) else [(key, value)]
    return found
