"""The configuration of an experiment: variants, each with trials, over seeds, on a task."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import Field, model_validator

from torchdsc.lab.schema import Model, Name, Seed, SettingsError, Unique, build, shorten
from torchdsc.lab.tasks import settings_type

from .values import Values, check_names, merge, only_variants

__all__ = ["Experiment", "Job", "Variant"]

Seeds = Annotated[list[Seed], Unique]


def _one_trial() -> list[Values]:
    return [{}]


def _one_case() -> dict[str, Values]:
    return {"": {}}


class Variant(Model):
    """What is compared: settings of its own."""

    name: Name
    """What it is called in tables."""
    settings: Values = Field(default_factory=dict)
    """Over those of the experiment: fields of the task's settings."""
    trials: Annotated[list[Values], Field(min_length=1)] = Field(default_factory=_one_trial)
    """Settings over these, of which the best is chosen on the validation part; a single one is taken as it is."""
    against: list[str] | None = None
    """Variants it is compared to, none where it is empty; the experiment's reference by default."""
    seeds: Annotated[Seeds, Field(min_length=1)] | None = None
    """Of its own, where an important comparison wants more; those of the experiment by default."""

    @model_validator(mode="after")
    def _check_trials(self) -> "Variant":
        for index, trial in enumerate(self.trials):
            if trial in self.trials[:index]:
                raise ValueError(f"must have different trials, got {trial!r} twice")
        return self


@dataclass(frozen=True)
class Job:
    """One run.

    Attributes:
        variant: Its name.
        trial: The settings it tries, or that were chosen.
        case: Name of the case, empty where there is one alone.
        seed: Of all that is random.
        is_trial: Whether it is to choose a trial by, without a look at the test part.
    """

    variant: str
    trial: Mapping[str, Any]
    case: str
    seed: int
    is_trial: bool

    @property
    def name(self) -> str:
        """Name of the run's folder."""
        settings = "-".join(f"{key} {value}" for key, value in _leaves(self.trial))
        parts = ("trial" if self.is_trial else "run", self.case, self.variant, settings, f"seed{self.seed}")
        return re.sub(r"[^\w.+-]+", "_", "-".join(part for part in parts if part))

    @property
    def key(self) -> Values:
        """The fields, which lead the run's record."""
        return {
            "variant": self.variant,
            "trial": dict(self.trial),
            "case": self.case,
            "seed": self.seed,
            "is_trial": self.is_trial,
        }

    def is_of(self, record: Mapping[str, Any]) -> bool:
        """Whether a record is this run's."""
        return all(record[name] == value for name, value in self.key.items())


class Experiment(Model):
    """Variants, trained once with every seed and on every case as the best of their trials was."""

    title: str = ""
    """What it is to find out."""
    task: Name = "language_modelling"
    """What runs train for: "language_modelling", "adaptation", "forecasting", or a class of one's own, as
    "module:Class"."""
    settings: Values = Field(default_factory=dict)
    """Of all runs, fields of the task's settings. A mapping given in several places is merged by its keys."""
    trial_settings: Values = Field(default_factory=dict)
    """Over these, what differs in trials: fewer steps, say."""
    cases: Annotated[dict[str, Values], Field(min_length=1)] = Field(default_factory=_one_case)
    """Settings by name, over those of all runs: each variant runs on each case, and is scored by the mean."""
    tuning_cases: Annotated[list[str], Field(min_length=1), Unique] | None = None
    """Names of the cases that trials run on; all by default."""
    variants: Annotated[list[Variant], Field(min_length=1)]
    """What is compared."""
    seeds: Seeds = Field(default_factory=lambda: [0])
    """Every variant runs once with each; none for an experiment of trials alone."""
    tuning_seed: Seed = 1000
    """Of the trials."""
    reference: str | None = None
    """The variant that others are compared to; the first by default."""
    test: bool = True
    """Whether runs end with a look at the test part: not where others are chosen by them."""
    timing_rounds: Annotated[int, Field(ge=2)] = 20
    """Rounds in which variants are timed in turn."""

    @model_validator(mode="after")
    def _check(self) -> "Experiment":
        names = [variant.name for variant in self.variants]
        if len(set(names)) != len(names):
            raise ValueError(f"variants must have different names, got {names}")
        if self.reference is not None and self.reference not in names:
            raise ValueError(f"reference must be the name of a variant, {names}, got {self.reference!r}")
        if not set(self.tuning_cases or []) <= set(self.cases):
            raise ValueError(f"tuning_cases must be among the cases, {list(self.cases)}, got {self.tuning_cases}")
        for variant in self.variants:
            if not set(variant.against or []) <= set(names) - {variant.name}:
                raise ValueError(
                    f"against of variant {variant.name!r} must be names of other variants, {names}, "
                    f"got {variant.against}"
                )
        if not self.seeds and all(len(variant.trials) == 1 and not variant.seeds for variant in self.variants):
            raise ValueError("seeds must be one or more where no variant has trials to choose from, got []")
        folders: dict[str, Job] = {}
        for job in self.possible_jobs():
            # What a run refuses is refused before the first.
            self.settings_of(job)
            other = folders.setdefault(job.name, job)
            if other.key != job.key:
                raise ValueError(f"runs must differ in the names of their folders, got {job.name!r} twice")
        return self

    def variant(self, name: str) -> Variant:
        """The variant of that name."""
        return next(variant for variant in self.variants if variant.name == name)

    @property
    def chosen_reference(self) -> str:
        """The name of the reference."""
        return self.reference or self.variants[0].name

    def others(self, variant: Variant) -> list[str]:
        """Names of the variants that it is compared to."""
        if variant.against is not None:
            return variant.against
        return [] if self.chosen_reference == variant.name else [self.chosen_reference]

    def settings_of(self, job: Job) -> Any:
        """The settings of a run.

        Raises:
            SettingsError: If they do not fit the task; names the variant.
        """
        layers = [self.settings, self.cases[job.case], self.trial_settings if job.is_trial else {}]
        values: Values = {}
        for layer in (*layers, self.variant(job.variant).settings, job.trial):
            values = merge(values, layer)
        return build(settings_type(self.task), values, f"settings of variant {job.variant!r}")

    def leaves_test_alone(self, job: Job) -> bool:
        """Whether a run ends without a look at the test part."""
        return job.is_trial or not self.test

    def trial_jobs(self) -> Iterator[Job]:
        """The runs by which trials are chosen."""
        for variant in self.variants:
            if len(variant.trials) > 1:
                for trial in variant.trials:
                    for case in self.tuning_cases or self.cases:
                        yield Job(variant.name, trial, case, self.tuning_seed, is_trial=True)

    def run_jobs(self, chosen: Mapping[str, Mapping[str, Any]]) -> Iterator[Job]:
        """The runs that variants are compared by, as the chosen trials were; seed by seed."""
        for seed in dict.fromkeys(seed for variant in self.variants for seed in variant.seeds or self.seeds):
            for variant in self.variants:
                if seed in (variant.seeds or self.seeds):
                    for case in self.cases:
                        yield Job(variant.name, chosen[variant.name], case, seed, is_trial=False)

    def possible_jobs(self) -> Iterator[Job]:
        """All trials, and all runs that a choice among them may ask for."""
        yield from self.trial_jobs()
        most = max(len(variant.trials) for variant in self.variants)
        for index in range(most):
            yield from self.run_jobs({v.name: v.trials[min(index, len(v.trials) - 1)] for v in self.variants})

    def part(self, variants: Sequence[str] = (), cases: Sequence[str] = ()) -> "Experiment":
        """The experiment of some of its variants and cases alone; of all for none.

        Raises:
            SettingsError: If a name is unknown.
        """
        values = self.model_dump()
        if variants:
            values = only_variants(values, variants)
        if cases:
            check_names("cases", cases, list(self.cases))
            values["cases"] = {name: case for name, case in self.cases.items() if name in cases}
            values["tuning_cases"] = [name for name in self.tuning_cases or [] if name in cases] or None
        return build(Experiment, values)

    def extended_by(self, other: "Experiment") -> "Experiment":
        """This experiment with the seeds, cases, variants and trials that the other has beside.

        Raises:
            SettingsError: If the two differ in anything else.
        """
        mine, theirs = self.model_dump(), other.model_dump()
        for name in ("task", "trial_settings", "tuning_seed", "test"):
            _refuse_change(name, mine[name], theirs[name])
        # What is told may be left out elsewhere.
        defaults = _defaults(self.task)
        _refuse_change("settings", {**defaults, **mine["settings"]}, {**defaults, **theirs["settings"]})
        mine["settings"] = {**mine["settings"], **theirs["settings"]}
        for name in ("title", "reference", "tuning_cases", "timing_rounds"):
            mine[name] = theirs[name] or mine[name]
        variants = {item["name"]: item for item in mine["variants"]}
        for item in theirs["variants"]:
            known = variants.setdefault(item["name"], item)
            _refuse_change(f"settings of variant {item['name']!r}", known["settings"], item["settings"])
            known["trials"] = _united(known["trials"], item["trials"])
            if known["seeds"] or item["seeds"]:
                known["seeds"] = _united(known["seeds"] or mine["seeds"], item["seeds"] or theirs["seeds"])
            if known["against"] is not None or item["against"] is not None:
                known["against"] = _united(known["against"] or [], item["against"] or [])
        for name, case in theirs["cases"].items():
            _refuse_change(f"case {name!r}", mine["cases"].setdefault(name, case), case)
        mine["seeds"] = _united(mine["seeds"], theirs["seeds"])
        mine["variants"] = list(variants.values())
        return build(Experiment, mine)


def _united(first: list[Any], second: list[Any]) -> list[Any]:
    return first + [item for item in second if item not in first]


def _refuse_change(name: str, kept: Any, wanted: Any) -> None:
    if kept == wanted:
        return
    if isinstance(kept, dict) and isinstance(wanted, dict):
        name = next(key for key in {**kept, **wanted} if kept.get(key) != wanted.get(key))
        kept, wanted = kept.get(name), wanted.get(name)
    raise SettingsError(f"an experiment with {name} {shorten(kept)} instead of {shorten(wanted)}")


def _defaults(task: str) -> Values:
    fields = settings_type(task).model_fields
    return {n: f.get_default(call_default_factory=True) for n, f in fields.items() if not f.is_required()}


def _leaves(values: Mapping[str, Any]) -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for key, value in values.items():
        found += _leaves(value) if isinstance(value, Mapping) else [(key, value)]
    return found
