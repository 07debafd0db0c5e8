"""The runs of an experiment's folder, which any number of processes may share."""

import gc
import json
import logging
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from statistics import fmean
from typing import Any

from pydantic_core import to_jsonable_python

from torchdsc.lab.files import locked, read_json, write_json
from torchdsc.lab.schema import Model
from torchdsc.lab.tasks.task import Record, Task
from torchdsc.lab.training.checkpoints import checkpoint_step
from torchdsc.lab.training.environment import peak_memory_bytes, provenance, reset_peak_memory
from torchdsc.lab.training.runs import RECORD

from .config import Experiment, Job
from .results import RESULTS, Results
from .words import duration

__all__ = ["Queue"]

ERROR = "error.json"
_POLL_SECONDS = 5.0

_logger = logging.getLogger(__name__)


class Queue:
    """The runs of an experiment's folder: those that are done, and those still to do.

    Args:
        experiment: All that the folder holds.
        task: Its task.
        folder: The folder.
        say: Told of each run that begins, in a line.
    """

    def __init__(self, experiment: Experiment, task: Task[Any], folder: Path, say: Callable[[str], None]) -> None:
        self._experiment, self._task, self._folder, self._say = experiment, task, folder, say
        # Runs of which results.json alone tells, as in a checkout.
        self._before = Results.read(folder) if (folder / RESULTS).is_file() else Results(experiment)
        self._pace: dict[str, list[float]] = {}
        # By name: records do not change once they are there.
        self._found: dict[str, Record] = {}
        # Failures of earlier calls, each of which is tried once more.
        self._again = {file.parent.name for file in folder.glob(f"*/{ERROR}")}

    def do(self, jobs: Sequence[Job]) -> list[Record]:
        """Do jobs in order, passing over those that another process is at, until all are done or have failed."""
        while True:
            open_jobs = [job for job in jobs if not self._is_settled(job)]
            taken = False
            for job in open_jobs:
                with locked(self._folder / job.name / ".lock", wait=False) as is_mine:
                    if is_mine and not self._is_settled(job):
                        taken = True
                        self._attempt(job, jobs)
            if not open_jobs:
                return [record for job in jobs if (record := self.record(job)) is not None]
            if not taken:
                time.sleep(_POLL_SECONDS)

    def record(self, job: Job) -> Record | None:
        """What a finished run recorded, led by its job; None for a run that is not done.

        Raises:
            ValueError: If it is damaged, or that of another run.
        """
        if job.name in self._found:
            return self._found[job.name]
        file = self._folder / job.name / RECORD
        if file.is_file():
            found: Record | None = {**job.key, **read_json(file, keys=("config", "data", self._task.measure.key))}
        else:
            file = self._folder / RESULTS
            found = next((r for r in (*self._before.trials, *self._before.runs) if job.is_of(r)), None)
        if found is None:
            return None
        self._check(found, job, file)
        return self._found.setdefault(job.name, found)

    def _check(self, found: Record, job: Job, file: Path) -> None:
        """A record under a run's name must be that of this very run."""
        settings = self._experiment.settings_of(job)
        wanted = json.loads(settings.model_dump_json())
        # A record from before there was a setting is of a run as its default still makes it.
        config = {**_defaults(type(settings)), **found["config"]}
        different = [name for name in wanted if config.get(name) != wanted[name]]
        if different or found["data"] != self._task.data(settings):
            what = f"{different[0]} {config.get(different[0])!r}" if different else "other data"
            raise ValueError(f"{file} must be of this experiment, got {job.name} with {what}: delete it to run it anew")

    def results(self) -> Results:
        """All that is there now."""
        jobs = {job.name: job for job in self._experiment.possible_jobs()}
        records = [record for job in jobs.values() if (record := self.record(job)) is not None]
        errors = [file for name in jobs if (file := self._folder / name / ERROR).is_file()]
        has_before = (self._folder / RESULTS).is_file()
        return Results(
            self._experiment,
            trials=[record for record in records if record["is_trial"]],
            runs=[record for record in records if not record["is_trial"]],
            failed=[read_json(file) for file in errors],
            # Another process may have measured meanwhile.
            timing=Results.read(self._folder).timing if has_before else {},
        )

    def _is_settled(self, job: Job) -> bool:
        if (self._folder / job.name / ERROR).is_file() and job.name not in self._again:
            return True
        return self.record(job) is not None

    def _attempt(self, job: Job, jobs: Sequence[Job]) -> None:
        """Do a job, whose lock is held; an error is recorded."""
        folder = self._folder / job.name
        settings = self._experiment.settings_of(job)
        before = checkpoint_step(folder)
        state = f" (going on from step {before})" if before else ""
        done = sum(self._is_settled(other) for other in jobs)
        left = self._left([other for other in jobs if not self._is_settled(other)])
        self._say(f"{done + 1} of {len(jobs)}: {job.name}{state}{left}")
        self._again.discard(job.name)
        with suppress(FileNotFoundError):
            (folder / ERROR).unlink()
        is_trial = self._experiment.leaves_test_alone(job)
        started = time.perf_counter()
        reset_peak_memory()
        try:
            found = self._task.run(settings, job.seed, folder, label=job.name, is_trial=is_trial)
        except Exception as error:
            words = f"{type(error).__name__}: {' '.join(str(error).split())}"
            _logger.warning("%s failed: %s", job.name, words)
            trace = traceback.format_exc()
            write_json(folder / ERROR, {**job.key, "error": words, "traceback": trace, **provenance()})
            return
        finally:
            gc.collect()
        seconds = time.perf_counter() - started
        if not (folder / RECORD).is_file():
            write_json(folder / RECORD, {**self._usual(settings, seconds), "seed": job.seed, **found})
        if settings.steps > before:
            self._pace.setdefault(job.variant, []).append(seconds / (settings.steps - before))

    def _usual(self, settings: Any, seconds: float) -> dict[str, Any]:
        """What every record has, of a task that writes none itself."""
        return {
            "description": self._task.describe(settings),
            "steps": settings.steps,
            **{"curve": [], "train_curve": [], "routing": None, "diverged_at_step": None},
            **{"train_seconds": seconds, "peak_memory_bytes": peak_memory_bytes()},
            "config": json.loads(settings.model_dump_json()),
            "data": self._task.data(settings),
            **provenance(),
        }

    def _left(self, jobs: Iterable[Job]) -> str:
        """What the runs still to do will take, in words; nothing before a run has been seen."""
        if not self._pace:
            return ""
        means = {variant: fmean(seconds) for variant, seconds in self._pace.items()}
        # A variant not seen yet is taken for the average of those that were.
        other = fmean(means.values())
        seconds = sum(self._experiment.settings_of(job).steps * means.get(job.variant, other) for job in jobs)
        return f"; about {duration(seconds)} left" if seconds else ""


def _defaults(kind: type[Model]) -> dict[str, Any]:
    """The defaults of settings, as JSON has them."""
    fields = {name: field for name, field in kind.model_fields.items() if not field.is_required()}
    return {name: to_jsonable_python(field.get_default(call_default_factory=True)) for name, field in fields.items()}
