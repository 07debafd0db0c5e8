"""The state of a model's routed layers at one measurement, as values."""

from dataclasses import asdict, dataclass, fields
from statistics import fmean
from typing import Any


@dataclass(frozen=True)
class LayerHealth:
    """One routed layer; what it does not have, or what was not seen, is None.

    Attributes:
        name: Of the module, as in ``named_modules()``.
        num_atoms: M, the atoms or experts.
        top_k: K, of a token.
        tokens: That were routed; those that a mask leaves out do not count.
        gate_kind: "sum", "mean" or "none", see :func:`torchdsc.ops.gate`; None for layers without one.
        most_rank_u: The highest effective rank that the atoms u can have, min(M, d_in).
        most_rank_v: Of the atoms v.
        utilization: Share of them that the tokens of this measurement selected.
        effective_atoms: ``exp`` of the entropy of their load; M if it is uniform.
        unused: Share of them that no measurement has seen selected so far.
        strength: Mean signal strength S.
        gate: Mean tanh S; tanh (S / K) for ``gate="mean"``; None for ``gate="none"``.
        saturated: Share of tokens whose gate is above 0.999.
        clamped: Share of selected logits at the bounds of the clamp, where a logit has no gradient.
        agreement: Share of the selections of a few tokens that the step has left as they were; of DSC alone. The
            router's input is the same before and after, so that this is the router's own change.
        effective_rank_u: Of the atoms u: between 1 and min(M, d_in). See :func:`torchdsc.diagnostics.effective_rank`.
        effective_rank_v: Of the atoms v.
        coherence_u: Root mean square of the inner products of different unit atoms u.
        coherence_v: Of the atoms v.
        excess_u: Mean square of these inner products above Welch's bound, the least that M rows can have: 0 for a tight
            frame.
        excess_v: Of the atoms v.
        effective_rank_dw: Mean effective rank of dW among a few tokens: between 1 and K.
        turn: Median angle, in degrees, by which one step has turned the atoms that it has changed.
        certified_norm: The bound of |dW|_2, see :func:`torchdsc.certified_spectral_bound`.
        measured_norm: The largest |dW|_2 among a few tokens.
    """

    name: str
    num_atoms: int
    top_k: int
    tokens: int = 0
    gate_kind: str | None = None
    most_rank_u: int | None = None
    most_rank_v: int | None = None
    utilization: float | None = None
    effective_atoms: float | None = None
    unused: float | None = None
    strength: float | None = None
    gate: float | None = None
    saturated: float | None = None
    clamped: float | None = None
    agreement: float | None = None
    effective_rank_u: float | None = None
    effective_rank_v: float | None = None
    coherence_u: float | None = None
    coherence_v: float | None = None
    excess_u: float | None = None
    excess_v: float | None = None
    effective_rank_dw: float | None = None
    turn: float | None = None
    certified_norm: float | None = None
    measured_norm: float | None = None


_NOT_MEASURED = ("name", "num_atoms", "top_k", "tokens", "gate_kind", "most_rank_u", "most_rank_v")
_MEASURED = tuple(field.name for field in fields(LayerHealth) if field.name not in _NOT_MEASURED)


@dataclass(frozen=True)
class ModelHealth:
    """All routed layers of a model at one measurement.

    Attributes:
        layers: In the model's order.
        gradient_norms: Norms of the gradients of "atoms", "router", "gamma" and "other" parameters; empty if there were
            none.
    """

    layers: list[LayerHealth]
    gradient_norms: dict[str, float]

    def means(self) -> dict[str, float]:
        """Means over the layers that have a figure, by its name, and ``gradient_norm_atoms`` and so on."""
        found = {name: [getattr(layer, name) for layer in self.layers] for name in _MEASURED}
        known = {name: [value for value in values if value is not None] for name, values in found.items()}
        means = {name: fmean(values) for name, values in known.items() if values}
        return means | {f"gradient_norm_{name}": norm for name, norm in self.gradient_norms.items()}

    def metrics(self, *, per_layer: bool = False, max_keys: int = 128, prefix: str = "dsc") -> dict[str, float]:
        """Flat numbers for a log.

        Args:
            per_layer: Whether to add each layer's to the means over layers.
            max_keys: The most numbers to return. Where layers have more, evenly spaced layers are taken.
            prefix: What names begin with.

        Returns:
            ``{prefix}/gate`` and so on, means over the layers that have it; ``{prefix}/gradient_norm_atoms`` and so on;
            and with ``per_layer`` ``{prefix}/{layer}/gate`` and so on.
        """
        metrics = dict(list({f"{prefix}/{name}": value for name, value in self.means().items()}.items())[:max_keys])
        if not per_layer or not self.layers:
            return metrics
        names = [name for name in _MEASURED if any(getattr(layer, name) is not None for layer in self.layers)]
        room = min(len(self.layers), (max_keys - len(metrics)) // max(1, len(names)))
        for place in range(room):
            layer = self.layers[place * (len(self.layers) - 1) // max(1, room - 1)]
            own = {f"{prefix}/{layer.name}/{name}": getattr(layer, name) for name in names}
            metrics |= {key: value for key, value in own.items() if value is not None}
        return metrics

    def as_dict(self) -> dict[str, Any]:
        """The fields, for JSON."""
        return asdict(self)
