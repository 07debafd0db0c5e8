"""Counts of the atoms or experts that a model's routed layers select."""

from dataclasses import asdict, dataclass
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn

from torchdsc.nn import DSC, NgramRouter, RoutedLayer
from torchdsc.ops import gate

# Most points of a load curve that are kept.
_LOAD_POINTS = 200

LOAD_EDGES = (0.25, 0.5, 1.0, 2.0, 4.0)
"""Edges between the bins of a histogram of loads, in multiples of the even share 1 / M."""


@dataclass(frozen=True)
class LayerRouting:
    """Routing of one layer.

    Attributes:
        num_atoms: M, the number of atoms or experts.
        utilization: Share of them that were selected at least once.
        effective_atoms: ``exp`` of the entropy of the load; M if it is uniform.
        strength: Mean signal strength S; None for layers without a gate, and where
            atoms are hashed, as S is constant then.
        gate: Mean tanh S; tanh (S / K) for ``gate="mean"``; None likewise, and for ``gate="none"``.
        load: Each atom's share of all selections, in descending order, thinned to at most 200 evenly spaced points.
        histogram: Share of the atoms that were never selected, and then of those with a load below each of
            :data:`LOAD_EDGES` and with one above the last: seven numbers that sum to 1.
    """

    num_atoms: int
    utilization: float
    effective_atoms: float
    strength: float | None
    gate: float | None
    load: list[float]
    histogram: list[float]

    def as_dict(self) -> dict[str, Any]:
        """The fields, for JSON."""
        return asdict(self)


def num_units(layer: RoutedLayer) -> int:
    """M, the number of atoms or experts."""
    number: int = layer.options.num_atoms if isinstance(layer, DSC) else layer.num_experts  # type: ignore[assignment]
    return number


def is_gated(layer: RoutedLayer) -> bool:
    """Whether there is a gate to watch: where atoms are hashed, S is a constant."""
    return isinstance(layer, DSC) and not isinstance(layer.router, NgramRouter)


def gates_of(layer: DSC, logits: Tensor) -> tuple[Tensor, Tensor | None]:
    """S of selected logits (T, K) and what the layer makes of it, tanh S or tanh (S / K); None without a gate."""
    options = layer.options
    strength = gate(logits, logit_clamp=options.logit_clamp, eps=options.eps).strength
    if options.gate == "none":
        return strength, None
    return strength, torch.tanh(strength / (logits.shape[-1] if options.gate == "mean" else 1))


def load_of(counts: Tensor) -> tuple[Tensor, float, float]:
    """Each atom's share of all selections (M,), the share of atoms that have any, and ``exp`` of the load's entropy."""
    share = counts.double() / counts.sum()
    return share, float((share > 0).double().mean()), float(torch.special.entr(share).sum().exp())


def _histogram(share: Tensor) -> list[float]:
    """Shares of the atoms in the bins of :data:`LOAD_EDGES`, those without a load in one of their own."""
    multiples = share * len(share)
    bins = torch.bucketize(multiples, torch.tensor(LOAD_EDGES, dtype=multiples.dtype), right=True) + 1
    counts = torch.bincount(bins.masked_fill(share == 0, 0), minlength=len(LOAD_EDGES) + 2)
    return (counts.double() / len(share)).tolist()


def shared(selected: Tensor, others: Tensor) -> float:
    """Share of the selections (tokens, K) that the same token has among others (tokens, K')."""
    return float((selected.unsqueeze(-1) == others.unsqueeze(-2)).any(-1).double().mean())


class RoutingMonitor:
    """Context manager that counts the selections of every routed layer.

    Example::

        with RoutingMonitor(model) as monitor:
            model(input_ids)
        monitor.layers()[0].utilization

    Args:
        model: Any module that contains routed layers.
        tokens: Of each layer's first call, whose selections are kept: to compare them with a later monitor's.
    """

    def __init__(self, model: nn.Module, *, tokens: int = 0) -> None:
        self._counters = [_Counter(module, tokens) for module in model.modules() if isinstance(module, RoutedLayer)]
        self._handles: list[Any] = []

    def __enter__(self) -> Self:
        self._handles = [counter.layer.router.register_forward_hook(counter) for counter in self._counters]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def layers(self) -> list[LayerRouting]:
        """The counts of each layer; layers that saw no token are left out."""
        return list(self.by_layer().values())

    def selections(self) -> list[Tensor]:
        """What the first tokens selected, indices of shape (tokens, K) of each layer that saw any."""
        return [counter.selected for counter in self._counters if counter.selected is not None]

    def by_layer(self) -> dict[RoutedLayer, LayerRouting]:
        """The counts by layer; layers that saw no token are left out."""
        return {counter.layer: counter.result() for counter in self._counters if counter.tokens}


class _Counter:
    def __init__(self, layer: RoutedLayer, followed: int) -> None:
        self.layer, self.has_gate = layer, is_gated(layer)
        self.followed = followed
        self.tokens = 0
        self.selected: Tensor | None = None
        self.counts: Tensor | None = None
        self.strength_sum = 0.0
        self.gate_sum: float | None = None

    @torch.no_grad()
    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if isinstance(self.layer, DSC) and self.has_gate:
            strength, gates = gates_of(self.layer, output.logits)
            self.strength_sum += float(strength.sum())
            self.gate_sum = None if gates is None else (self.gate_sum or 0.0) + float(gates.sum())
        counts = torch.bincount(output.indices.reshape(-1), minlength=num_units(self.layer)).cpu()
        self.counts = counts if self.counts is None else self.counts + counts
        self.tokens += output.indices.shape[0]
        if self.followed and self.selected is None:
            self.selected = output.indices[: self.followed].cpu()

    def result(self) -> LayerRouting:
        assert self.counts is not None
        share, utilization, effective = load_of(self.counts)
        load = share.sort(descending=True).values
        points = torch.linspace(0, len(load) - 1, min(_LOAD_POINTS, len(load))).round().long()
        return LayerRouting(
            num_atoms=len(share),
            utilization=utilization,
            effective_atoms=effective,
            strength=self.strength_sum / self.tokens if self.has_gate else None,
            gate=None if self.gate_sum is None else self.gate_sum / self.tokens,
            load=load[points].tolist(),
            histogram=_histogram(share),
        )
