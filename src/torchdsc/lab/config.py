"""The configuration of an experiment, and the presets."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from math import inf
from typing import Any, Literal, get_args

from torchdsc.arguments import own_copies

from .budget import METHODS, Budget
from .presets import preset_names, read_preset

__all__ = ["METHODS", "ExperimentConfig", "load_preset", "preset_names"]

# What may differ from method to method: the optimizer's settings, K, and options of the feed-forward layer.
_OVERRIDABLE = ("learning_rate", "router_lr_multiplier", "atom_lr_multiplier", "weight_decay", "top_k", "feed_forward")

# Conditions on numbers, written so that NaN fails them.
_Range = tuple[Callable[[Any], bool], str]
_AT_LEAST_1: _Range = (lambda value: value >= 1, ">= 1")
_RANGES: dict[str, _Range] = {
    **dict.fromkeys(("d_model", "n_layer", "n_head", "window", "top_k", "rank", "experts_per_token"), _AT_LEAST_1),
    **dict.fromkeys(("steps", "batch_size", "accumulation", "eval_every", "eval_batch_size"), _AT_LEAST_1),
    **dict.fromkeys(("eval_windows", "test_windows"), _AT_LEAST_1),
    **dict.fromkeys(
        ("total", "active", "learning_rate", "router_lr_multiplier", "atom_lr_multiplier"),
        (lambda v: 0 < v < inf, "> 0"),
    ),
    **dict.fromkeys(("warmup_steps", "weight_decay"), (lambda value: 0 <= value < inf, ">= 0")),
    **dict.fromkeys(("dropout", "beta1", "beta2"), (lambda value: 0 <= value < 1, "in [0, 1)")),
    "max_grad_norm": (lambda value: value > 0, "> 0"),
    # Sixty times the largest vocabularies in use.
    "vocab_size": (lambda value: value <= 2**24, "at most 2^24 = 16,777,216"),
    "min_lr_ratio": (lambda value: 0 <= value <= 1, "in [0, 1]"),
    "latency_rounds": (lambda value: value >= 2, ">= 2"),
}


@dataclass(frozen=True)
class ExperimentConfig:
    """Dense, MoE, Mixture-of-LoRAs and DSC language models trained at equal budgets.

    Attributes:
        methods: Names of feed-forward layers.
        seeds: Every method is trained once with each seed.
        corpus: "embedded" (the Python standard library), "wikitext-2", "wikitext-103", or a path to text.
        preparation: "plain", or "published" for the published run's text preparation.
        max_bytes: Bytes of each split to use at most.
        tokenizer: "bpe" (trained on the training part), "bytes", "gpt2", or a folder or hub id.
        vocab_size: Of a trained BPE.
        total: Target of stored parameters of the model.
        active: Target of active parameters.
        match: Method whose realised parameter counts replace the targets for the other methods.
        d_model: Hidden size.
        n_layer: Layers.
        n_head: Attention heads.
        window: Tokens of a training sequence T.
        dropout: Of the model.
        residual_init: See DSCGPTConfig.
        top_k: K, atoms a token composes; experts a token takes for Mixture-of-LoRAs and PEER.
        rank: Of Mixture-of-LoRAs.
        experts_per_token: Of MoE.
        steps: Optimizer steps.
        batch_size: Sequences of a step.
        accumulation: Micro-batches that a step is cut into; must divide batch_size.
        learning_rate: Peak of the cosine schedule.
        min_lr_ratio: Its end, as a share of the peak.
        warmup_steps: Linear warm-up.
        router_lr_multiplier: Factor on routers' learning rate.
        atom_lr_multiplier: Factor on that of DSC's atoms.
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
        overrides: By method: learning_rate, router_lr_multiplier, atom_lr_multiplier, weight_decay, top_k, and
            feed_forward, further options of its layer. ``--overrides.moe.learning_rate 0.002`` sets one,
            ``--overrides '{moe: {...}}'`` all of them.
    """

    methods: list[str] = field(default_factory=lambda: ["dense", "moe", "mixture_of_loras", "dsc"])
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
    atom_lr_multiplier: float = 1.0
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
        own_copies(self)
        _check_methods("methods", self.methods)
        if not self.methods or len(set(self.methods)) != len(self.methods):
            raise ValueError(f"methods must be one or more different names, got {self.methods}")
        if self.match is not None:
            _check_methods("match", [self.match])
        if not self.seeds or len(set(self.seeds)) != len(self.seeds):
            raise ValueError(f"seeds must be one or more different integers, got {self.seeds}")
        for seed in self.seeds:
            _check("seeds", seed, 0 <= seed < 2**32, "in 0 .. 2^32 - 1")
        for name, (holds, expected) in _RANGES.items():
            _check(name, getattr(self, name), holds(getattr(self, name)), expected)
        for name in ("preparation", "residual_init", "precision"):
            choices = get_args(type(self).__annotations__[name])
            _check(name, getattr(self, name), getattr(self, name) in choices, f"one of {choices}")
        _check("max_bytes", self.max_bytes, self.max_bytes is None or self.max_bytes >= 1, "None or >= 1")
        if self.batch_size % self.accumulation:
            raise ValueError(f"accumulation must divide batch_size = {self.batch_size}, got {self.accumulation}")
        if self.d_model % self.n_head:
            raise ValueError(f"n_head must divide d_model = {self.d_model}, got {self.n_head}")
        self._check_overrides()

    def _check_overrides(self) -> None:
        _check_methods("overrides", list(self.overrides))
        for method, values in self.overrides.items():
            if not isinstance(values, dict) or set(values) - set(_OVERRIDABLE):
                raise ValueError(f"overrides of {method} must be among {_OVERRIDABLE}, got {values!r}")
            if not isinstance(values.get("feed_forward", {}), dict):
                raise ValueError(f"overrides of {method}: feed_forward must be options, got {values['feed_forward']!r}")
            for name in set(values) - {"feed_forward"}:
                holds, expected = _RANGES[name]
                is_kind = isinstance(values[name], int if name == "top_k" else int | float)
                expected = f"an int {expected}" if name == "top_k" else expected
                _check(f"{name} of {method} in overrides", values[name], is_kind and holds(values[name]), expected)

    def of_method(self, method: str, name: str) -> Any:
        """A setting with the method's override applied; "feed_forward" gives the options of its layer."""
        override = self.overrides.get(method, {})
        if name == "feed_forward":
            return dict(override.get(name, {}))
        return override.get(name, getattr(self, name))

    def doubts(self) -> list[str]:
        """Warnings, as sentences, about settings that are allowed but hardly intended."""
        found = []
        if self.warmup_steps >= self.steps:
            found.append(f"warmup_steps = {self.warmup_steps:,} of {self.steps:,} steps: no step has the full rate")
        for method in self.methods:
            rate = self.of_method(method, "learning_rate")
            # AdamW moves a weight by about the rate each step.
            if rate > 0.1:
                found.append(f"learning_rate = {rate:g} of {method}: weights begin at about 0.02, and 0.01 is high")
        return found

    def budget(self, vocab_size: int) -> Budget:
        """The budget of the solver, for a vocabulary of ``vocab_size`` tokens."""
        return Budget(self.total, self.active, self.d_model, self.n_layer, vocab_size, self.window)

    def as_dict(self) -> dict[str, Any]:
        """The fields, for YAML and JSON."""
        return asdict(self)


def load_preset(name: str) -> dict[str, Any]:
    """Fields of a preset.

    Args:
        name: One of :func:`preset_names`.

    Returns:
        Fields of :class:`ExperimentConfig`.

    Raises:
        ValueError: If there is no such preset, or it sets an unknown field.
    """
    values = read_preset(name)
    unknown = set(values) - {f.name for f in fields(ExperimentConfig)}
    if unknown:
        raise ValueError(f"preset {name!r} must set fields of ExperimentConfig, got {sorted(unknown)}")
    return values


def _check_methods(name: str, methods: list[str]) -> None:
    unknown = [method for method in methods if method not in METHODS]
    if unknown:
        raise ValueError(f"{name} must be among {', '.join(METHODS)}, got {', '.join(map(str, unknown))}")


def _check(name: str, value: object, holds: bool, expected: str) -> None:
    if not holds:
        raise ValueError(f"{name} must be {expected}, got {value!r}")
