"""The magnitude gate: from selected logits to coefficients, equation (5)."""

from types import ModuleType
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor
from torch.nn import functional

from .native import FEW_PAIRS, module_for

GateKind = Literal["sum", "mean", "none"]
_KINDS = get_args(GateKind)


class Gate(NamedTuple):
    """Coefficients z of shape (..., K) and signal strength S of shape (...), both in the dtype of the logits."""

    coefficients: Tensor
    strength: Tensor


def gate(logits: Tensor, *, logit_clamp: float = 20.0, eps: float = 1e-6, kind: GateKind = "sum") -> Gate:
    """Turn the selected raw logits into coefficients: ``z = alpha / (S + eps) tanh(S)``, equation (5).

    Here ``alpha = softplus(clamp(logits, -tau, tau))`` and ``S = sum alpha``, so that the coefficients sum to less than
    ``tanh(S) < 1``, equation (6). A row with a logit that is not finite becomes NaN, and no other row.

    Args:
        logits: Selected raw logits of shape (..., K), float32 or float64.
        logit_clamp: tau > 0.
        eps: Stability constant > 0.
        kind: "sum" is the paper's ``tanh(S)``; "mean" is ``tanh(S / K)``, which is not saturated at the start; "none"
            leaves the factor out.

    Returns:
        The coefficients and the strength S.

    Raises:
        ValueError: If ``logit_clamp`` or ``eps`` is not positive, or ``kind`` is unknown.
    """
    if not logit_clamp > 0:
        raise ValueError(f"logit_clamp must be > 0, got {logit_clamp}")
    if not eps > 0:
        raise ValueError(f"eps must be > 0, got {eps}")
    if kind not in _KINDS:
        raise ValueError(f"kind must be one of {_KINDS}, got {kind!r}")
    # The size is compared last, not under tracing, where that would specialise a symbolic size.
    if not torch.is_grad_enabled() and not torch.compiler.is_compiling():
        native = module_for(logits)
        if native is not None and 0 < logits.numel() <= FEW_PAIRS and logits.dim() > 0:
            return _gate_compiled(native, logits, logit_clamp, eps, kind)
    return _gate_by_tensors(logits, logit_clamp, eps, kind)


def _gate_by_tensors(logits: Tensor, logit_clamp: float, eps: float, kind: GateKind) -> Gate:
    # A threshold of 40 keeps softplus exact to rounding in float64; torch's default of 20 is off by 2e-9.
    scores = functional.softplus(logits.clamp(-logit_clamp, logit_clamp), 1.0, 40.0)
    # Adding 0 times the raw logits makes the scores of infinite ones NaN.
    scores = torch.add(scores, logits, alpha=0.0)
    strength = scores.sum(-1, keepdim=True)
    if kind == "sum":
        factor = torch.tanh(strength) / (strength + eps)
    elif kind == "mean":
        factor = torch.tanh(strength / logits.shape[-1]) / (strength + eps)
    else:
        factor = 1.0 / (strength + eps)
    return Gate(scores * factor, strength.squeeze(-1))


def _gate_compiled(native: ModuleType, logits: Tensor, logit_clamp: float, eps: float, kind: GateKind) -> Gate:
    coefficients, strength = torch.empty_like(logits), logits.new_empty(logits.shape[:-1])
    native.gate(
        logits=logits,
        coefficients=coefficients,
        strength=strength,
        tokens=strength.numel(),
        top_k=logits.shape[-1],
        kind=_KINDS.index(kind),
        clamp=logit_clamp,
        eps=eps,
    )
    return Gate(coefficients, strength)
