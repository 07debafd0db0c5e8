"""The configuration of a study: what all runs share, variants with their trials, and seeds."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from torchdsc.arguments import own_copies
from torchdsc.lab.config import ExperimentConfig
from torchdsc.lab.mappings import from_mapping

__all__ = ["StudyConfig", "Variant"]

# What tells the layer apart within an experiment's settings.
_LAYER = "feed_forward"
# One corpus and its tokens serve all runs.
_SHARED = ("corpus", "preparation", "max_bytes", "tokenizer", "vocab_size")
_FIELDS = {f.name for f in fields(ExperimentConfig)} - {"methods", "seeds", "overrides"} | {_LAYER}


@dataclass(frozen=True)
class Variant:
    """A method with settings of its own.

    Attributes:
        name: What it is called in tables.
        method: "dense", "moe", "mixture_of_loras", "peer" or "dsc".
        settings: Over those of the study: fields of :class:`torchdsc.lab.config.ExperimentConfig`, and
            "feed_forward", further options of the layer.
        trials: Settings over these, one of which is chosen by validation loss; a single one is taken as it is.
        against: Names of the variants it is compared to, none where it is empty; the study's reference by default.
    """

    name: str
    method: str
    settings: dict[str, Any] = field(default_factory=dict)
    trials: list[dict[str, Any]] = field(default_factory=lambda: [{}])
    against: list[str] | None = None

    def __post_init__(self) -> None:
        own_copies(self)
        if not isinstance(self.trials, list) or not self.trials:
            raise ValueError(f"trials of variant {self.name!r} must be one or more settings, got {self.trials!r}")
        for what, values in (("settings", self.settings), *(("trials", trial) for trial in self.trials)):
            _check_settings(f"{what} of variant {self.name!r}", values, _FIELDS - set(_SHARED))


@dataclass(frozen=True)
class StudyConfig:
    """Variants at equal budgets.

    Attributes:
        variants: What is compared.
        settings: Of all runs, fields of :class:`torchdsc.lab.config.ExperimentConfig`.
        trial_settings: Over these, what differs in trials: fewer steps, say.
        seeds: Every variant is trained once with each, as its best trial was; none for a study of trials alone.
        tuning_seed: Seed of the trials.
        reference: Name of the variant that others are compared to; the first by default.
        test: Whether runs end with a look at the test part: not in a study that others are chosen by.
    """

    variants: list[Variant]
    settings: dict[str, Any] = field(default_factory=dict)
    trial_settings: dict[str, Any] = field(default_factory=dict)
    seeds: list[int] = field(default_factory=lambda: [0])
    tuning_seed: int = 1000
    reference: str | None = None
    test: bool = True

    def __post_init__(self) -> None:
        own_copies(self)
        names = [variant.name for variant in self.variants]
        if not names or len(set(names)) != len(names):
            raise ValueError(f"variants must be one or more of different names, got {names}")
        if self.reference is not None and self.reference not in names:
            raise ValueError(f"reference must be the name of a variant, {names}, got {self.reference!r}")
        for variant in self.variants:
            others = variant.against
            if others is not None and not (isinstance(others, list) and set(others) <= set(names) - {variant.name}):
                raise ValueError(
                    f"against of {variant.name!r} must be names of other variants, {names}, got {others!r}"
                )
        if len(set(self.seeds)) != len(self.seeds):
            raise ValueError(f"seeds must be different integers, got {self.seeds}")
        if not self.seeds and all(len(variant.trials) == 1 for variant in self.variants):
            raise ValueError("seeds must be one or more where no variant has trials to choose from, got []")
        _check_settings("settings", self.settings, _FIELDS)
        _check_settings("trial_settings", self.trial_settings, _FIELDS - set(_SHARED))
        # What an experiment refuses is refused before the first run.
        for variant in self.variants:
            for trial in variant.trials:
                for seed in self.seeds or [self.tuning_seed]:
                    self.experiment(variant, trial, seed, is_trial=False)
                self.experiment(variant, trial, self.tuning_seed, is_trial=True)

    def experiment(self, variant: Variant, trial: Mapping[str, Any], seed: int, *, is_trial: bool) -> ExperimentConfig:
        """The configuration of one run."""
        layers = [self.settings, self.trial_settings if is_trial else {}, variant.settings, trial]
        values: dict[str, Any] = {}
        options: dict[str, Any] = {}
        for layer in layers:
            values |= layer
            options |= layer.get(_LAYER, {})
        values.pop(_LAYER, None)
        if options:
            values["overrides"] = {variant.method: {_LAYER: options}}
        return ExperimentConfig(**values, methods=[variant.method], seeds=[seed])

    def as_dict(self) -> dict[str, Any]:
        """The fields, for YAML and JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "StudyConfig":
        """The configuration of plain values, as from YAML.

        Raises:
            ValueError: If a field is unknown or missing, or out of its range.
        """
        variants = [from_mapping(Variant, "variants", item) for item in values.get("variants", [])]
        config: StudyConfig = from_mapping(cls, "study", {**values, "variants": variants})
        return config


def _check_settings(name: str, values: Any, known: set[str]) -> None:
    if not isinstance(values, Mapping):
        raise ValueError(f"{name} must be a mapping, got {values!r}")
    unknown = sorted(set(values) - known)
    if unknown:
        raise ValueError(f"{name} must be among {sorted(known)}, got {unknown}")
    if not isinstance(values.get(_LAYER, {}), Mapping):
        raise ValueError(f"{_LAYER} in {name} must be options, got {values[_LAYER]!r}")
