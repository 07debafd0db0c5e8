"""A study: tuning trials, runs at the rates they chose, and a comparison. Several processes may share its folder."""

import math
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from rich.console import Console
from torch import nn
from torch.optim import AdamW
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from torchdsc.lab.dry_run import Work, print_work
from torchdsc.lab.environment import hardware, peak_memory_bytes, quiet_transformers, reset_peak_memory
from torchdsc.lab.files import read_json, write_json
from torchdsc.lab.latency import measure_in_turn
from torchdsc.lab.queue import locked, refuse_launch, refuse_shared_folders, share, take_folder, write_results

from .config import AdaptConfig, Method, resolve_base
from .data import TaskData, load_task
from .methods import adapter_parameters, build_model, naming_base, solve_size
from .report import render_report
from .run import RECORD, Job, adapt_run
from .summary import to_markdown

__all__ = ["adapt", "dry_run"]

TIMING = "timing.json"


def adapt(config: AdaptConfig, folder: Path, *, console: Console | None = None) -> dict[str, Any]:
    """Run a study, or what is left of it, and write its results.

    ``folder`` ends with ``config.yaml``, ``data.json`` (hashes of the data), one folder a run, ``results.json``,
    ``table.md`` and ``report.html``. Runs that are there are kept, and one that was interrupted goes on from its last
    checkpoint. Processes that are given the same folder share the work: each takes runs that no other is at.

    Args:
        config: The study.
        folder: Its own folder.
        console: Where to print.

    Returns:
        What ``results.json`` holds: "config", "rates", "timing", "trials" and "runs".

    Raises:
        SettingsError: If methods do not fit the base model or their budget, or two runs would share a folder.
        ValueError: If ``folder`` holds another study, data do not suit their task or have changed since the study
            began, or several processes were launched together.
        OSError: If a file cannot be read or written.
    """
    refuse_launch()
    console = console or Console()
    refuse_shared_folders((job.name, job.description) for job in _possible(config))
    tokenizer, data, methods = _load(config)
    take_folder(config.as_dict(), _hashes(data), folder)
    for method in methods:
        console.print(f"{method.name}: {method.kind} {method.options}", markup=False, highlight=False, soft_wrap=True)

    def run(jobs: list[Job]) -> list[dict[str, Any]]:
        def one(job: Job) -> dict[str, Any]:
            return adapt_run(config, job, data[job.task], tokenizer, folder / job.name, job.name)

        return share(jobs, one, lambda job: folder / job.name / RECORD, console)

    trials = run([job for method in methods for job in _trials(config, method)])
    rates = {method.name: _best_rate(config, method, trials) for method in methods}
    seeds = dict.fromkeys(seed for method in methods for seed in config.seeds_of(method))
    runs = run(
        [
            Job(task.name, method, rates[method.name], seed, is_trial=False)
            for seed in seeds
            for method in methods
            for task in config.tasks
            if seed in config.seeds_of(method)
        ]
    )
    with locked(folder / ".timing", wait=True):
        timing = _timing(config, methods, data, tokenizer, folder)
    results = {
        "format": 1,
        "config": config.as_dict(),
        "rates": rates,
        "timing": timing,
        "trials": trials,
        "runs": runs,
    }
    write_results(results, to_markdown(results), render_report(results), folder, console)
    return results


def dry_run(config: AdaptConfig, folder: Path, *, console: Console | None = None) -> None:
    """Print what :func:`adapt` would do: methods, sizes, and about how long it takes; ``folder`` is left as it is.

    A step and an evaluated batch of each method are timed on the first task, for which all tasks are taken.

    Args:
        config: The study.
        folder: Its own folder, in which some runs may be done.
        console: Where to print.

    Raises:
        ValueError: As :func:`adapt`, but for what ``folder`` holds.
        OSError: If a file cannot be read.
    """
    console = console or Console()
    tokenizer, data, methods = _load(config)
    for name, task in data.items():
        sizes = ", ".join(f"{len(getattr(task, part)):,} {part}" for part in ("train", "validation", "evaluation"))
        console.print(f"{name}: {sizes}", markup=False, highlight=False, soft_wrap=True)
    works = []
    for method in methods:
        jobs = [[job] for job in _trials(config, method)]
        # Which rate the runs take is not known before the trials are done.
        jobs += [
            [Job(task.name, method, rate, seed, is_trial=False) for rate in config.rates(method)]
            for seed in config.seeds_of(method)
            for task in config.tasks
        ]
        todo = [alike[0] for alike in jobs if not any((folder / job.name / RECORD).is_file() for job in alike)]
        parameters, step, evaluated = _measure(config, method, data[config.tasks[0].name], tokenizer)
        words = f"{method.name}: {method.kind} {method.options}; {parameters:,} parameters of the adapter"
        console.print(words, markup=False, highlight=False, soft_wrap=True)
        seconds = sum(_cost(config, job, data[job.task], step, evaluated) for job in todo)
        works.append(Work(method.name, len(jobs), len(jobs) - len(todo), seconds))
    print_work(console, works, folder)


def _load(config: AdaptConfig) -> tuple[PreTrainedTokenizerBase, dict[str, TaskData], list[Method]]:
    """Tokenizer, data of each task, and methods with their sizes."""
    with naming_base(config):
        tokenizer = AutoTokenizer.from_pretrained(resolve_base(config.base))
    if tokenizer.pad_token is None:
        # Causal LMs often come without one; what is padded is masked.
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    with quiet_transformers():
        methods = [solve_size(method, config) for method in config.methods]
    shared = ("max_length", "validation_examples", "head")
    settings = {name: getattr(config, name) for name in shared}
    data = {task.name: load_task(task, tokenizer, **settings) for task in config.tasks}
    return tokenizer, data, methods


def _hashes(data: dict[str, TaskData]) -> dict[str, str]:
    """Hashes of all sources, by what they are called in errors."""
    found: dict[str, str] = {}
    for name, part in data.items():
        task = part.task
        sources = [source for source in (task.train, task.evaluation, task.retain) if source is not None]
        found |= {f"{source} of task {name!r}": sha256 for source, sha256 in zip(sources, part.sha256, strict=True)}
    return found


def _possible(config: AdaptConfig) -> list[Job]:
    """All trials, and all runs that the choice of a learning rate may ask for."""
    return [
        *(job for method in config.methods for job in _trials(config, method)),
        *(
            Job(task.name, method, rate, seed, is_trial=False)
            for method in config.methods
            for task in config.tasks
            for rate in config.rates(method)
            for seed in config.seeds_of(method)
        ),
    ]


def _trials(config: AdaptConfig, method: Method) -> list[Job]:
    rates = config.rates(method)
    if len(rates) == 1:
        return []
    return [
        Job(task.name, method, rate, config.tuning_seed, is_trial=True) for rate in rates for task in config.tuned_on()
    ]


def _best_rate(config: AdaptConfig, method: Method, trials: list[dict[str, Any]]) -> float:
    """The learning rate with the highest mean score over the tuning tasks."""
    rates = config.rates(method)
    own = [trial for trial in trials if trial["method"] == method.name]
    if len(rates) == 1:
        return rates[0]

    def mean(rate: float) -> float:
        found = fmean(trial["score"] for trial in own if trial["learning_rate"] == rate)
        # A rate that diverged is the last to be chosen.
        return found if math.isfinite(found) else -math.inf

    return max(rates, key=mean)


def _timing(
    config: AdaptConfig,
    methods: list[Method],
    data: dict[str, TaskData],
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
) -> dict[str, dict[str, Any]]:
    """Milliseconds of a training step of each method, on one batch of the first task, in turn.

    Measured once; all of them again where a method is new, or another than the one that was measured under its name.
    """
    file = folder / TIMING
    kept = read_json(file) if file.is_file() else {}
    wanted = {method.name: {"kind": method.kind, "options": method.options} for method in methods}
    if all(_is_of(kept.get(name), wanted[name]) for name in wanted):
        return kept
    task = data[config.tasks[0].name]
    batch = _batch(config, task)

    def step(method: Method) -> Callable[[], object]:
        return _step(config, _model(config, method, task, tokenizer), batch)

    with quiet_transformers():
        peaks = {method.name: _peak(step(method)) for method in methods}
        timings = measure_in_turn({method.name: step(method) for method in methods}, rounds=config.timing_rounds)
    shape = list(batch["input_ids"].shape)
    measured = {
        name: {
            **wanted[name],
            "median": timing.median,
            "q1": timing.q1,
            "q3": timing.q3,
            "samples": timing.samples,
            "peak_memory_bytes": peaks[name],
            "batch": shape,
            "hardware": hardware(),
        }
        for name, timing in timings.items()
    }
    write_json(file, measured)
    return measured


def _model(config: AdaptConfig, method: Method, task: TaskData, tokenizer: PreTrainedTokenizerBase) -> nn.Module:
    return build_model(method, config, task, tokenizer.pad_token_id).to(_device())


def _batch(config: AdaptConfig, task: TaskData) -> dict[str, torch.Tensor]:
    """The batch of a step."""
    batch = task.collate([task.train[index % len(task.train)] for index in range(config.batch_size)])  # type: ignore[arg-type]
    return {name: value.to(_device()) for name, value in batch.items()}


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _step(config: AdaptConfig, model: nn.Module, batch: dict[str, torch.Tensor]) -> Callable[[], object]:
    """A training step of the model on the batch."""
    model.train()
    optimizer = AdamW([parameter for parameter in model.parameters() if parameter.requires_grad], lr=1e-5)

    def call() -> None:
        with torch.autocast(_device(), dtype=torch.bfloat16, enabled=config.precision == "bf16"):
            loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return call


def _is_of(timing: object, wanted: dict[str, Any]) -> bool:
    """Whether a whole measurement is that of the method."""
    return (
        isinstance(timing, dict)
        and {"samples", "peak_memory_bytes"} <= timing.keys()
        and wanted.items() <= timing.items()
    )


def _peak(step: Callable[[], object]) -> int:
    # The optimizer's state is made in the first step.
    step()
    reset_peak_memory()
    step()
    return peak_memory_bytes()


def _measure(
    config: AdaptConfig, method: Method, task: TaskData, tokenizer: PreTrainedTokenizerBase
) -> tuple[int, float, float]:
    """Parameters of the adapter, and seconds of a training step and of an evaluated batch."""
    with quiet_transformers():
        model = _model(config, method, task, tokenizer)
    parameters, batch = adapter_parameters(model), _batch(config, task)
    step = _seconds(_step(config, model, batch))
    model.eval()
    with torch.no_grad():
        return parameters, step, _seconds(lambda: model(**batch))


def _cost(config: AdaptConfig, job: Job, task: TaskData, step: float, evaluated: float) -> float:
    """Seconds of a run with its evaluations, where a step and an evaluated batch take these."""
    steps = config.steps_of(task.task)
    parts: list[Any] = [task.validation] * (0 if config.eval_every is None else math.ceil(steps / config.eval_every))
    parts.append(task.validation if job.is_trial else task.evaluation)
    batches = sum(map(len, parts)) / config.batch_size
    return steps * step + batches * evaluated


def _seconds(call: Callable[[], object]) -> float:
    return measure_in_turn({"": call}, rounds=2, warmup=1)[""].median / 1e3
