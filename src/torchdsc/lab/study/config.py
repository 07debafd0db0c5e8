"""The configuration of a study: what all runs share, variants with their trials, and seeds."""

from collections.abc import Mapping
from dataclasses import asdict, field, fields
from typing import Annotated, Any

from pydantic import AfterValidator, Field
from pydantic.dataclasses import dataclass

from torchdsc.arguments import own_copies
from torchdsc.lab.budget import METHODS
from torchdsc.lab.config import ExperimentConfig
from torchdsc.lab.schema import STRICT, Name, Seed, SettingsError, Unique, build, check_fields, shorten

__all__ = ["StudyConfig", "Variant"]

# What tells the layer apart within an experiment's settings.
_LAYER = "feed_forward"
# One corpus and its tokens serve all runs.
_SHARED = ("corpus", "preparation", "max_bytes", "tokenizer", "vocab_size")
_FIELDS = [f.name for f in fields(ExperimentConfig) if f.name not in ("methods", "seeds", "overrides")]


def _check_settings(values: dict[str, Any]) -> dict[str, Any]:
    """Fields of an experiment, and options of the layer, as they were given."""
    unknown = [name for name in values if name not in (*_FIELDS, _LAYER)]
    if unknown:
        raise SettingsError(f"must be among {', '.join([*_FIELDS, _LAYER])}, got {unknown[0]!r}")
    if not isinstance(values.get(_LAYER, {}), dict):
        raise SettingsError(f"{_LAYER} must be a mapping, got {shorten(values[_LAYER])}")
    check_fields(ExperimentConfig, {name: value for name, value in values.items() if name != _LAYER})
    return values


def _leave_out_shared(values: dict[str, Any]) -> dict[str, Any]:
    shared = [name for name in values if name in _SHARED]
    if shared:
        raise SettingsError(f"must leave {', '.join(_SHARED)} to the settings of all runs, got {shared[0]!r}")
    return values


Settings = Annotated[dict[str, Any], AfterValidator(_check_settings)]
OwnSettings = Annotated[Settings, AfterValidator(_leave_out_shared)]


@dataclass(frozen=True, config=STRICT)
class Variant:
    """A method with settings of its own.

    Attributes:
        name: What it is called in tables.
        method: One of :data:`torchdsc.lab.budget.METHODS`.
        settings: Over those of the study: fields of :class:`torchdsc.lab.config.ExperimentConfig`, and
            "feed_forward", further options of the layer.
        trials: Settings over these, one of which is chosen by validation loss; a single one is taken as it is.
        against: Names of the variants it is compared to, none where it is empty; the study's reference by default.
    """

    name: Name
    method: str
    settings: OwnSettings = field(default_factory=dict)
    trials: Annotated[list[OwnSettings], Field(min_length=1)] = field(default_factory=lambda: [{}])
    against: list[str] | None = None

    def __post_init__(self) -> None:
        own_copies(self)
        if self.method not in METHODS:
            raise ValueError(f"method must be among {', '.join(METHODS)}, got {self.method!r}")
        for index, trial in enumerate(self.trials):
            if trial in self.trials[:index]:
                raise ValueError(f"trials must be different, got {trial!r} twice")


@dataclass(frozen=True, config=STRICT)
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

    variants: Annotated[list[Variant], Field(min_length=1)]
    settings: Settings = field(default_factory=dict)
    trial_settings: OwnSettings = field(default_factory=dict)
    seeds: Annotated[list[Seed], Unique] = field(default_factory=lambda: [0])
    tuning_seed: Seed = 1000
    reference: str | None = None
    test: bool = True

    def __post_init__(self) -> None:
        own_copies(self)
        names = [variant.name for variant in self.variants]
        if len(set(names)) != len(names):
            raise ValueError(f"variants must have different names, got {names}")
        if self.reference is not None and self.reference not in names:
            raise ValueError(f"reference must be the name of a variant, {names}, got {self.reference!r}")
        for variant in self.variants:
            if not set(variant.against or []) <= set(names) - {variant.name}:
                raise ValueError(
                    f"against of variant {variant.name!r} must be names of other variants, {names}, "
                    f"got {variant.against}"
                )
        if not self.seeds and all(len(variant.trials) == 1 for variant in self.variants):
            raise ValueError("seeds must be one or more where no variant has trials to choose from, got []")
        # What an experiment refuses is refused before the first run.
        for variant in self.variants:
            for trial in variant.trials:
                for is_trial in (False, True):
                    self.experiment(variant, trial, self.tuning_seed, is_trial=is_trial)

    def experiment(self, variant: Variant, trial: Mapping[str, Any], seed: int, *, is_trial: bool) -> ExperimentConfig:
        """The configuration of one run.

        Raises:
            SettingsError: If its settings do not fit each other; names the variant.
        """
        layers = [self.settings, self.trial_settings if is_trial else {}, variant.settings, trial]
        values: dict[str, Any] = {}
        options: dict[str, Any] = {}
        for layer in layers:
            values |= layer
            options |= layer.get(_LAYER, {})
        values.pop(_LAYER, None)
        if options:
            values["overrides"] = {variant.method: {_LAYER: options}}
        try:
            return ExperimentConfig(**values, methods=[variant.method], seeds=[seed])
        except ValueError as error:
            raise SettingsError(f"settings of variant {variant.name!r}: {error}") from error

    def as_dict(self) -> dict[str, Any]:
        """The fields, for YAML and JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "StudyConfig":
        """The configuration of plain values, as from YAML.

        Raises:
            SettingsError: If a field is unknown or missing, of another type or out of its range.
        """
        return build(cls, values)
