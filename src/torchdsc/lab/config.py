"""The configuration of an experiment, and the presets."""

from dataclasses import asdict, dataclass, field, fields
from importlib import resources
from typing import Any, Literal

import yaml

from .budget import METHODS, Budget

__all__ = ["ExperimentConfig", "load_preset", "preset_names"]

# What may differ from method to method: the optimizer's settings, and options of the feed-forward layer.
_OVERRIDABLE = ("learning_rate", "router_lr_multiplier", "weight_decay", "feed_forward")


@dataclass(frozen=True)
class ExperimentConfig:
    """Dense, MoE, Mixture-of-LoRAs and DSC language models trained at equal budgets.

    Attributes:
        methods: Which, of dense, moe, mixture_of_loras and dsc.
        seeds: Every method is trained once with each.
        corpus: "embedded" (the Python standard library), "wikitext-2", "wikitext-103", or a path to text.
        preparation: "plain", or "published" for the published run's text preparation.
        max_bytes: Bytes of each split to use at most.
        tokenizer: "bpe" (trained on the training part), "bytes", "gpt2", or a folder or hub id.
        vocab_size: Of a trained BPE.
        total: Target of stored parameters of the model.
        active: Target of active parameters.
        match: Method whose realised numbers the others are solved to, in place of the targets.
        d_model: Hidden size.
        n_layer: Layers.
        n_head: Attention heads.
        window: Tokens of a training sequence T.
        dropout: Of the model.
        residual_init: See DSCGPTConfig.
        top_k: K, atoms a token composes; experts a token takes for Mixture-of-LoRAs.
        rank: Of Mixture-of-LoRAs.
        experts_per_token: Of MoE.
        steps: Optimizer steps.
        batch_size: Sequences of a step.
        accumulation: Micro-batches that a step is cut into; must divide batch_size.
        learning_rate: Peak of the cosine schedule.
        min_lr_ratio: Its end, as a share of the peak.
        warmup_steps: Linear warm-up.
        router_lr_multiplier: Factor on routers' learning rate.
        weight_decay: Of matrices; routers, embeddings, norms and gamma have none.
        beta1: Of AdamW.
        beta2: Of AdamW.
        max_grad_norm: Gradient clipping.
        eval_every: Steps between evaluations, and checkpoints.
        eval_windows: Validation windows.
        test_windows: Test windows, looked at once at the end.
        eval_batch_size: Sequences of an evaluation batch, and of the latency measurement.
        latency_rounds: Rounds of the latency measurement.
        precision: Of autocast in training; fp32 for none.
        compile: Whether to train through torch.compile.
        overrides: By method: learning_rate, router_lr_multiplier, weight_decay, and feed_forward, further options of
            its layer.
    """

    methods: list[str] = field(default_factory=lambda: list(METHODS))
    seeds: list[int] = field(default_factory=lambda: [42])
    corpus: str = "embedded"
    preparation: Literal["plain", "published"] = "plain"
    max_bytes: int | None = None
    tokenizer: str = "bpe"
    vocab_size: int = 4096
    total: float = 1_696_000
    active: float = 1_178_900
    match: str | None = None
    d_model: int = 128
    n_layer: int = 4
    n_head: int = 4
    window: int = 128
    dropout: float = 0.0
    residual_init: Literal["gpt2", "published", "none"] = "gpt2"
    top_k: int = 4
    rank: int = 1
    experts_per_token: int = 2
    steps: int = 400
    batch_size: int = 16
    accumulation: int = 1
    learning_rate: float = 4e-3
    min_lr_ratio: float = 0.1
    warmup_steps: int = 50
    router_lr_multiplier: float = 5.0
    weight_decay: float = 0.02
    beta1: float = 0.9
    beta2: float = 0.95
    max_grad_norm: float = 1.0
    eval_every: int = 100
    eval_windows: int = 64
    test_windows: int = 128
    eval_batch_size: int = 16
    latency_rounds: int = 20
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    compile: bool = False
    overrides: dict[str, dict[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check_methods("methods", self.methods)
        _check_methods("overrides", list(self.overrides))
        if self.match is not None:
            _check_methods("match", [self.match])
        if not self.seeds or len(set(self.seeds)) != len(self.seeds):
            raise ValueError(f"seeds must be one or more different integers, got {self.seeds}")
        for name in ("steps", "batch_size", "accumulation", "eval_every", "eval_windows", "test_windows", "window"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1, got {getattr(self, name)}")
        if self.batch_size % self.accumulation:
            raise ValueError(f"accumulation must divide batch_size = {self.batch_size}, got {self.accumulation}")
        for name in ("learning_rate", "router_lr_multiplier", "max_grad_norm"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be > 0, got {getattr(self, name)}")
        for method, values in self.overrides.items():
            unknown = set(values) - set(_OVERRIDABLE)
            if unknown:
                raise ValueError(f"overrides of {method} must be among {_OVERRIDABLE}, got {sorted(unknown)}")

    def of_method(self, method: str, name: str) -> Any:
        """A setting with the method's override applied; "feed_forward" gives the options of its layer."""
        override = self.overrides.get(method, {})
        if name == "feed_forward":
            return dict(override.get(name, {}))
        return override.get(name, getattr(self, name))

    def budget(self, vocab_size: int) -> Budget:
        """The budget of the solver, for a vocabulary of ``vocab_size`` tokens."""
        return Budget(self.total, self.active, self.d_model, self.n_layer, vocab_size, self.window)

    def as_dict(self) -> dict[str, Any]:
        """The fields, for YAML and JSON."""
        return asdict(self)


def preset_names() -> list[str]:
    """Names of the presets that come with the package."""
    return sorted(path.name.removesuffix(".yaml") for path in _folder().iterdir() if path.name.endswith(".yaml"))


def load_preset(name: str) -> dict[str, Any]:
    """Fields of a preset.

    Args:
        name: One of :func:`preset_names`.

    Returns:
        Fields of :class:`ExperimentConfig`.

    Raises:
        ValueError: If there is no such preset, or it sets an unknown field.
    """
    if name not in preset_names():
        raise ValueError(f"preset must be one of {preset_names()}, got {name!r}")
    values: dict[str, Any] = yaml.safe_load(_folder().joinpath(f"{name}.yaml").read_text(encoding="utf-8"))
    unknown = set(values) - {f.name for f in fields(ExperimentConfig)}
    if unknown:
        raise ValueError(f"preset {name!r} must set fields of ExperimentConfig, got {sorted(unknown)}")
    return values


def _folder() -> Any:
    return resources.files("torchdsc").joinpath("configs")


def _check_methods(name: str, methods: list[str]) -> None:
    unknown = [method for method in methods if method not in METHODS]
    if unknown or (name == "methods" and (not methods or len(set(methods)) != len(methods))):
        raise ValueError(f"{name} must be among {METHODS}, each once, got {methods}")
