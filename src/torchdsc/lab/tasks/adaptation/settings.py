"""Settings of a run: a base model, a method, what it is adapted to, and the schedule."""

from string import Formatter
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from torchdsc.lab.schema import Count, Model, Name, Rate, Unique

__all__ = ["WITHOUT_ADAPTER", "Head", "Metric", "Settings", "TaskKind"]

TaskKind = Literal["classification", "regression", "causal_lm", "prompted"]
Metric = Literal["accuracy", "matthews", "f1", "correlation", "loss"]
Head = Literal["embedding"] | None
WITHOUT_ADAPTER = ("full", "head")
_OF_DATA = {
    *("base", "head", "kind", "train", "evaluation", "retain", "choices", "replay", "quiet"),
    *("text", "label", "columns", "prompt", "answers", "metric"),
    *("max_train", "max_evaluation", "max_retained", "validation_examples", "max_length"),
}
# What the base model makes of its old domains depends on these too.
_OF_BASE = {"base_options", "precision", "batch_size"}
_OF_MODEL = {"base", "base_options", "head", "kind", "method", "budget", "options"}
# Metrics of each kind of task, the default first.
_METRICS: dict[str, tuple[Metric, ...]] = {
    "classification": ("accuracy", "matthews", "f1"),
    "regression": ("correlation",),
    "causal_lm": ("loss",),
    "prompted": ("accuracy", "matthews", "f1"),
}


class Settings(Model):
    """A base model adapted to a task."""

    base: Name
    """Folder or hub id of the base model, "package:NAME/folder" inside an installed package, "gguf:FILE.gguf" (the file
    may be inside a package too) or "llama2c:MODEL.bin:TOKENIZER.bin", files of llama2.c; both are converted into the
    cache, in float32."""
    base_options: dict[str, Any] = Field(default_factory=dict)
    """Fields of the base's configuration to change, such as its dropout or ``attn_implementation``."""
    head: Head = None
    """For classification and regression: nothing for the head that transformers has for the base model, which reads two
    texts as one sequence; "embedding" for a head on the embeddings of separately encoded texts."""
    method: Literal["dsc", "mixture_of_loras", "lora", "lily", "miss", "vblora", "vera", "full", "head"] = "dsc"
    """How to adapt; "full" trains the whole model, and "head" the new head alone."""
    budget: Count | None = None
    """Trainable parameters of an adapter, heads left out; its size (atoms, experts, rank or vectors) is the largest
    within. Nothing where ``options`` give the size."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Fields of the method's PEFT configuration."""
    train: Name
    """File (csv, tsv, jsonl, parquet; of text txt, raw, tokens), or id of a data set on the hub, "user/name:split" or
    "user/name/config:split"."""
    evaluation: Name | None = None
    """The same for the final score; by default a part of ``train`` that is held out for it."""
    kind: TaskKind = "classification"
    """Kind of task; "prompted" is a classification by a causal LM in its own words, by ``prompt`` and ``answers``."""
    text: Annotated[list[Name], Field(min_length=1, max_length=2), Unique] = Field(default_factory=lambda: ["text"])
    """Columns of text, one or two; a text file has one, "text"."""
    label: Name = "label"
    """Column of labels."""
    columns: Annotated[list[Name], Field(min_length=1), Unique] | None = None
    """Names of the columns of a file without a header."""
    prompt: Name | None = None
    """For "prompted", what the model reads of an example, with a column of ``text`` in braces: "Review: {sentence}
    Sentiment:". The answer alone is trained on."""
    answers: dict[str, str] | None = None
    """For "prompted", what follows the prompt, by label: one token each, {"0": " negative", "1": " positive"}. The one
    that the model finds most likely is scored."""
    metric: Metric | None = None
    """For classification, prompted or not, "accuracy" (the default), or for two labels "matthews" or "f1" (of the
    second in the order of text); for regression "correlation", the mean of Pearson's and Spearman's; for causal LMs
    "loss" in nats per token, whose negative is the score."""
    retain: Name | list[Name] | None = None
    """For causal LMs, prompted or not, texts of old domains, one or more: their losses before and after tell what is
    forgotten."""
    choices: Count | None = None
    """Questions made of each of these texts at most: which of four continuations follows? Needs ``retain``."""
    replay: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the examples of training that are blocks of these texts, none that is evaluated. Needs ``retain``."""
    quiet: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    """For DSC routed by embeddings, weight of the mean signal strength on as many blocks of these texts as a step has
    examples, none that is evaluated: the gate closes there. Needs ``retain``."""
    max_train: Count | None = None
    """Examples to train on at most, the first after shuffling with a fixed seed."""
    max_evaluation: Count | None = None
    """Examples to evaluate on at most, the first."""
    max_retained: Count | None = None
    """Blocks of each of the texts of old domains to evaluate on at most, the first; by default ``max_evaluation``."""
    validation_examples: Count = 500
    """Examples (or blocks) held out of train, which trials and checkpoints are chosen by; where no evaluation is named,
    as many more are held out for that."""
    steps: Count = 200
    """Optimizer steps."""
    batch_size: Count = 16
    """Examples of a step."""
    accumulation: Count = 1
    """Micro-batches that a step is cut into; must divide batch_size."""
    max_length: Count = 128
    """Tokens of an example at most; of a block for causal LMs."""
    learning_rate: Rate = 1e-3
    """Peak of the schedule."""
    head_learning_rate: Rate | None = None
    """Of the new head, which no method's rate needs to suit then; the method's by default."""
    warmup_steps: Annotated[int, Field(ge=0)] = 10
    """Linear warm-up, before a cosine to zero."""
    weight_decay: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    """Of AdamW."""
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    """Gradient clipping."""
    update_scale: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Factor of the whole update once training has ended: on the way back to the base model less is learnt, and less
    forgotten. For LoRA, DSC and full fine-tuning."""
    also_scaled: Annotated[list[Annotated[float, Field(gt=0, lt=1)]], Unique] = Field(default_factory=list)
    """Further factors of the same update, below ``update_scale``, that the run is measured at: a curve of what is
    forgotten against what is learnt. The weights that are saved are those of ``update_scale``."""
    eval_every: Count | None = None
    """Steps between evaluations on held-out examples, of which the best checkpoint is kept; nothing for the last step's
    weights."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Of autocast; fp32 for none."""

    @model_validator(mode="after")
    def _check(self) -> "Settings":
        metrics = _METRICS[self.kind]
        if self.metric is not None and self.metric not in metrics:
            raise ValueError(f"metric must be one of {metrics} for kind = {self.kind!r}, got {self.metric!r}")
        if not self.is_causal_lm:
            for name in ("retain", "max_retained"):
                if getattr(self, name) is not None:
                    raise ValueError(f"{name} must be left out for kind = {self.kind!r}, got {getattr(self, name)!r}")
        if self.retain is not None and len(set(self.old_texts)) != max(1, len(self.old_texts)):
            raise ValueError(f"retain must be one text or more, all different, got {self.retain}")
        by_embeddings = self.options.get("router_input") == "embeddings" and self.options.get("router") != "ngram"
        if self.quiet and not (self.method == "dsc" and by_embeddings):
            raise ValueError(f"quiet must be 0 but for DSC with router_input = 'embeddings', got {self.quiet:g}")
        for name in ("choices", "replay", "quiet", "max_retained"):
            if getattr(self, name) and self.retain is None:
                raise ValueError(f"{name} must be left out without retain, got {getattr(self, name)}")
        if self.kind == "causal_lm" and len(self.text) > 1:
            raise ValueError(f"text must be one column for kind = 'causal_lm', got {self.text}")
        if self.is_causal_lm and self.head is not None:
            raise ValueError(f"head must be left out for kind = {self.kind!r}, got {self.head!r}")
        if self.is_causal_lm and self.method == "head":
            raise ValueError(f"method must not be 'head' for kind = {self.kind!r}, which has no new head")
        self._check_prompt()
        self._check_scales()
        if self.method in WITHOUT_ADAPTER and self.options:
            raise ValueError(f"options must be left out for method = {self.method!r}, which has no adapter")
        if self.warmup_steps > self.steps:
            raise ValueError(f"warmup_steps must be in 0 .. steps = {self.steps}, got {self.warmup_steps}")
        if self.batch_size % self.accumulation:
            raise ValueError(f"accumulation must divide batch_size = {self.batch_size}, got {self.accumulation}")
        return self

    def _check_prompt(self) -> None:
        for name in ("prompt", "answers"):
            if (getattr(self, name) is not None) != (self.kind == "prompted"):
                wanted = "given" if self.kind == "prompted" else "left out"
                raise ValueError(f"{name} must be {wanted} for kind = {self.kind!r}, got {getattr(self, name)!r}")
        if self.answers is not None and len(set(self.answers.values())) < max(2, len(self.answers)):
            raise ValueError(f"answers must be two or more, all different, got {self.answers}")
        if self.prompt is not None:
            try:
                names = [name for _, name, _, _ in Formatter().parse(self.prompt) if name is not None]
            except ValueError as error:
                raise ValueError(
                    f"prompt must be a text with columns in braces, got {self.prompt!r}: {error}"
                ) from error
            if "\\n" in self.prompt:
                raise ValueError(
                    f"prompt must have a line break where it has \\ and n, as $'...' in a shell, got {self.prompt!r}"
                )
            if set(names) != set(self.text):
                raise ValueError(f"prompt must have each column of text, {self.text}, in braces, got {self.prompt!r}")

    def _check_scales(self) -> None:
        scales = {"update_scale": self.update_scale != 1, "also_scaled": bool(self.also_scaled)}
        allowed = {"modules_to_save": (None,), "init_lora_weights": (True, False, "gaussian")}
        for setting in (name for name, is_set in scales.items() if is_set):
            value = getattr(self, setting)
            is_dora = self.method == "lora" and self.options.get("use_dora")
            if self.method not in ("lora", "dsc", "full") or is_dora:
                method = f"{self.method!r}{' with DoRA' if is_dora else ''}"
                raise ValueError(f"{setting} must be left out for method = {method}, got {value}")
            for name, values in allowed.items():
                if name in self.options and self.options[name] not in values:
                    raise ValueError(f"options must not set {name} for {setting}, got {self.options[name]!r}")
            if self.eval_every is not None:
                raise ValueError(f"eval_every must be left out for {setting}, as no evaluation in training sees it")
        if any(factor >= self.update_scale for factor in self.also_scaled):
            raise ValueError(f"also_scaled must be below update_scale = {self.update_scale:g}, got {self.also_scaled}")

    @property
    def is_causal_lm(self) -> bool:
        """Whether the base model is a causal LM, with no new head."""
        return self.kind in ("causal_lm", "prompted")

    @property
    def scored_by(self) -> Metric:
        """The metric in force."""
        return self.metric or _METRICS[self.kind][0]

    @property
    def old_texts(self) -> list[str]:
        """Sources of the old domains."""
        return [self.retain] if isinstance(self.retain, str) else list(self.retain or ())

    @property
    def data_key(self) -> str:
        """The settings that its examples depend on."""
        return self.model_dump_json(include=_OF_DATA)

    @property
    def base_key(self) -> str:
        """The settings that the base model's outputs depend on, beside its data."""
        return self.model_dump_json(include=_OF_BASE)

    @property
    def model_key(self) -> str:
        """The settings that the solved options depend on."""
        return self.model_dump_json(include=_OF_MODEL)
