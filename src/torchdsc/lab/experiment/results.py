"""What an experiment found: its configuration, the records of its runs, and timings, as ``results.json`` has them."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

from torchdsc.lab.files import read_json, write_json
from torchdsc.lab.schema import build
from torchdsc.lab.tasks import load_task
from torchdsc.lab.tasks.task import Measure, Record, Task

from .config import Experiment

__all__ = ["CONFIG", "RESULTS", "Results", "choose"]

CONFIG, RESULTS = "config.yaml", "results.json"
_FORMAT = 2


@dataclass(frozen=True)
class Results:
    """Records of an experiment. Each leads with the fields of its :class:`~torchdsc.lab.experiment.config.Job`.

    Attributes:
        experiment: Its configuration.
        trials: Records by which trials are chosen.
        runs: Records that variants are compared by; those of trials that are chosen no longer are kept too.
        failed: Runs that raised an error: the fields of the job, and "error".
        timing: By variant, milliseconds of what the task times: "median", "q1", "q3", "samples" (those of one round
            belong together), "peak_memory_bytes", "batch" and "hardware"; None for one that could not be timed.
    """

    experiment: Experiment
    trials: list[Record] = field(default_factory=list)
    runs: list[Record] = field(default_factory=list)
    failed: list[Record] = field(default_factory=list)
    timing: dict[str, dict[str, Any] | None] = field(default_factory=dict)

    @property
    def task(self) -> type[Task[Any]]:
        """The class of its task."""
        found: type[Task[Any]] = load_task(self.experiment.task)
        return found

    @property
    def measure(self) -> Measure:
        """What its variants are compared by."""
        return self.task.measure_of([*self.trials, *self.runs])

    @property
    def chosen(self) -> dict[str, dict[str, Any]]:
        """By variant, the trial that its runs are like."""
        return choose(self.experiment, self.trials, self.measure)

    def runs_of(self, variant: str) -> list[Record]:
        """The records that a variant is compared by."""
        chosen = self.chosen[variant]
        return [run for run in self.runs if run["variant"] == variant and run["trial"] == chosen]

    @classmethod
    def read(cls, folder: Path) -> "Results":
        """What a folder's ``results.json`` holds.

        Raises:
            ValueError: If it is damaged, or of another format.
            OSError: If there is none.
        """
        file = folder / RESULTS
        names = ("experiment", "trials", "runs", "failed", "timing")
        values = read_json(file, keys=("format", *names))
        if values["format"] != _FORMAT:
            raise ValueError(f"{file} must have format {_FORMAT}, got {values['format']}")
        return cls(build(Experiment, values["experiment"], str(file)), **{name: values[name] for name in names[1:]})

    def write(self, folder: Path) -> None:
        """Write ``results.json``."""
        parts = {"trials": self.trials, "runs": self.runs, "failed": self.failed, "timing": self.timing}
        write_json(folder / RESULTS, {"format": _FORMAT, "experiment": self.experiment.model_dump(), **parts})


def choose(experiment: Experiment, trials: Sequence[Record], measure: Measure) -> dict[str, dict[str, Any]]:
    """By variant, the trial with the best mean over the tuning cases; one that failed or diverged comes last."""
    sign = 1 if measure.lower_is_better else -1
    cases = experiment.tuning_cases or list(experiment.cases)

    def cost(variant: str, trial: Mapping[str, Any]) -> float:
        own = [record for record in trials if record["variant"] == variant and record["trial"] == trial]
        values = [record[measure.key] for record in own if record["case"] in cases]
        mean = fmean(values) if len(values) == len(cases) else math.nan
        return sign * mean if math.isfinite(mean) else math.inf

    return {v.name: min(v.trials, key=partial(cost, v.name)) for v in experiment.variants}
