"""What is wrong with a model in training: the rules by which its measured state is judged."""

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Literal

from torch import nn

from torchdsc.nn import DSC
from torchdsc.ops.native import build_name
from torchdsc.ops.triton_runtime import has_triton

from .health import LayerHealth, ModelHealth

# Each limit lies beyond what any healthy run of the experiments has shown (experiments/README.md, diagnostics).
_WEAK_GATE = 0.02
_FEW_ATOMS = 2.0
_LOW_RANK = 0.05
_MOSTLY = 0.5
_LARGE_TURN = 45.0
_EXPLOSION = 100.0
# Few tokens use few atoms in any case.
_FEWEST_TOKENS = 32
# Norms are measured in the dtype of the model.
_ROUNDING = 1.02


class DiagnosticsWarning(UserWarning):
    """A model in training shows a sign of failure."""


@dataclass(frozen=True)
class Finding:
    """A sign of failure.

    Attributes:
        code: Its short name.
        where: Names of the layers that show it; empty if it is the whole model's.
        sign: What was measured.
        cause: What usually brings it about.
        remedy: What to do.
    """

    code: str
    where: tuple[str, ...]
    sign: str
    cause: str
    remedy: str

    def __str__(self) -> str:
        layers = f" in {_listed(self.where)}" if self.where else ""
        return f"{self.code}{layers}: {self.sign}. Cause: {self.cause}. Remedy: {self.remedy}"


def findings(health: ModelHealth, history: Sequence[ModelHealth] = ()) -> list[Finding]:
    """Judge a measurement.

    Args:
        health: The measurement.
        history: Those before it, in order: gradients are compared with theirs, and a collapsed routing must have lasted
            from the last one on.

    Returns:
        What was found, one for each sign, with the layers that show it.
    """
    found: list[Finding] = []
    for rule in _LAYER_RULES:
        if (rule.when == "at the start" and history) or (rule.when == "later" and not history):
            continue
        layers = [layer for layer in health.layers if rule.is_so(layer)]
        if rule.when == "lasting" and history:
            before = {layer.name for layer in history[-1].layers if rule.is_so(layer)}
            layers = [layer for layer in layers if layer.name in before]
        if layers:
            names = tuple(layer.name for layer in layers)
            found.append(Finding(rule.code, names, rule.sign(layers[0]), rule.cause, rule.remedy))
    return [*found, *_exploding(health, history)]


def slow_path(model: nn.Module) -> Finding | None:
    """Whether layers compose by tensor operations alone, which are no faster than a dense layer.

    Args:
        model: Any module.
    """
    layers = [(name, layer) for name, layer in model.named_modules() if isinstance(layer, DSC)]
    slow = tuple(name for name, layer in layers if layer.options.impl == "reference")
    where = next((parameter.device.type for _, layer in layers for parameter in layer.parameters()), "cpu")
    missing = None
    if where == "cuda" and not has_triton():
        missing = "triton, for its kernels, is not installed or does not import"
    elif where == "cpu" and build_name() is None:
        missing = "the compiled functions are not installed"
    if not slow and missing is None:
        return None
    return Finding(
        "slow-path",
        slow,
        missing or "impl = 'reference'",
        "the factorised composition is done by general tensor operations, which copy K atoms for each token",
        "leave impl = 'auto'; on a GPU install triton, on a CPU a wheel with the compiled functions",
    )


def warn(found: Sequence[Finding], known: set[str]) -> None:
    """Warn of findings whose code is not ``known`` yet, and add their codes to it."""
    for finding in found:
        if finding.code not in known:
            known.add(finding.code)
            warnings.warn(DiagnosticsWarning(str(finding)), stacklevel=3)


@dataclass(frozen=True)
class _Rule:
    """A sign that a layer may show; see :class:`Finding`. ``when`` says at which measurements it is looked for."""

    code: str
    is_so: Callable[[LayerHealth], bool]
    sign: Callable[[LayerHealth], str]
    cause: str
    remedy: str
    when: Literal["always", "at the start", "later", "lasting"] = "always"


def _beyond(value: float | None, limit: float) -> bool:
    return value is not None and value > limit


def _below(value: float | None, limit: float) -> bool:
    return value is not None and value < limit


_LAYER_RULES: tuple[_Rule, ...] = (
    _Rule(
        "signal-collapse",
        lambda layer: _below(layer.gate, _WEAK_GATE),
        lambda layer: f"the gate lets {layer.gate:.3g} of the update through (S {layer.strength:.3g})",
        "all logits have fallen, as under a budget below what is needed, a large L_budget or L_z, or router decay",
        "raise budget, lower budget_weight or z_weight, take the router out of weight decay "
        "(torchdsc.parameter_groups), or lower its learning rate",
    ),
    _Rule(
        "routing-collapse",
        lambda layer: (
            layer.num_atoms > 4 * layer.top_k
            and layer.tokens >= _FEWEST_TOKENS
            and _below(layer.effective_atoms, _FEW_ATOMS * layer.top_k)
        ),
        lambda layer: f"{layer.effective_atoms:.3g} of {layer.num_atoms} atoms do the work, K is {layer.top_k}",
        "the router sends most tokens to the same atoms",
        "raise aux_weight, lower the router's learning rate, or check that regularisers are in the loss",
        # Routers start anew in the first steps of healthy runs.
        when="lasting",
    ),
    _Rule(
        "bank-collapse",
        lambda layer: _below(_rank_share(layer), _LOW_RANK),
        lambda layer: f"the atoms span {min(_ranks(layer)):.3g} directions",
        "atoms have turned to the same few directions",
        "raise frame_weight, lower the atoms' learning rate, or their number",
    ),
    _Rule(
        "logits-clamped",
        lambda layer: _beyond(layer.clamped, _MOSTLY),
        lambda layer: f"{layer.clamped:.0%} of the selected logits are at the bounds of the clamp, without a gradient",
        "the router's logits have grown, mostly by too large a learning rate; seen before a run collapsed",
        "lower the learning rate of the router, raise z_weight, or set z_loss_on_raw_logits=True",
    ),
    _Rule(
        "saturated-gate",
        # With many atoms the sum is large whatever the logits are, and the gate 1 by design.
        lambda layer: (
            (layer.gate_kind == "mean" or math.tanh(layer.top_k * math.log(2)) < 0.999)
            and _beyond(layer.saturated, 0.99)
        ),
        lambda layer: (
            f"from the start tanh S is above 0.999 for {layer.saturated:.0%} of tokens (S {layer.strength:.3g})"
        ),
        "logits start too large, so that the gate tells no token from another and has no gradient",
        "lower router_init_std, raise z_weight, or set gate='mean' where it is 'sum'",
        # A gate may open as training goes on.
        when="at the start",
    ),
    _Rule(
        "atoms-turn",
        lambda layer: _beyond(layer.turn, _LARGE_TURN),
        lambda layer: f"one step turns atoms by {layer.turn:.0f} degrees",
        "steps are larger than the raw rows, whose norm is only a scale",
        "lower the atoms' learning rate (atom_lr_multiplier), or raise atom_init_norm",
        # The first steps leave the small initial rows behind; that is meant.
        when="later",
    ),
    _Rule(
        "norm-above-bound",
        lambda layer: (
            layer.certified_norm is not None and _beyond(layer.measured_norm, _ROUNDING * layer.certified_norm)
        ),
        lambda layer: f"|dW|_2 is {layer.measured_norm:.3g}, above its bound {layer.certified_norm:.3g}",
        "atoms are not unit rows, as where a bank's forward pass was replaced or projection onto unit norms is missing",
        "compose through the bank (DSC, torchdsc.ops.compose with eps)",
    ),
)


def _ranks(layer: LayerHealth) -> list[float]:
    return [rank for rank in (layer.effective_rank_u, layer.effective_rank_v) if rank is not None]


def _rank_share(layer: LayerHealth) -> float | None:
    """The lower of both sides' effective ranks over the highest that they could have."""
    sides = ((layer.effective_rank_u, layer.most_rank_u), (layer.effective_rank_v, layer.most_rank_v))
    return min((rank / most for rank, most in sides if rank is not None and most), default=None)


def _exploding(health: ModelHealth, history: Sequence[ModelHealth]) -> Iterator[Finding]:
    norm = _total(health)
    if norm is None:
        return
    part = max(health.gradient_norms, key=lambda name: _order(health.gradient_norms[name]))
    found = exploding(
        norm, [total for total in map(_total, history) if total is not None], f", mostly of {part} parameters"
    )
    if found is not None:
        yield found


def exploding(norm: float, before: Sequence[float], words: str = "") -> Finding | None:
    """Judge the norm of all gradients by those before it; ``words`` go on from it."""
    finite = [each for each in before if math.isfinite(each)]
    if math.isfinite(norm) and (len(finite) < 3 or norm <= _EXPLOSION * median(finite)):
        return None
    return Finding(
        "exploding-gradients",
        (),
        f"the gradient's norm is {norm:.3g}{words}"
        + (f"; the median before was {median(finite):.3g}" if finite else ""),
        "a learning rate that is too large, no clipping, or atoms whose projection onto unit norms is missing",
        "clip gradients (torchdsc.optim.clip_grad_norm), lower the rate of the part named, or warm up longer",
    )


def _order(norm: float) -> float:
    return norm if math.isfinite(norm) else math.inf


def _total(health: ModelHealth) -> float | None:
    norms = health.gradient_norms.values()
    return math.sqrt(sum(norm * norm for norm in norms)) if norms else None


def _listed(names: Sequence[str], most: int = 3) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
