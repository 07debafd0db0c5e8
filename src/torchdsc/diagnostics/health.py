"""The state of a model's routed layers during training, measured every so many steps."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from torchdsc.arguments import check_at_least, check_types
from torchdsc.bounds import certified_spectral_bound, spectral_norm
from torchdsc.nn import DSC, BasisBank, NgramRouter, RoutedLayer, Router
from torchdsc.ops import gate

from .bank import followed_atoms, measure_bank


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
        found = {name: _known(getattr(layer, name) for layer in self.layers) for name in _MEASURED}
        metrics = {f"{prefix}/{name}": fmean(values) for name, values in found.items() if values}
        metrics |= {f"{prefix}/gradient_norm_{name}": norm for name, norm in self.gradient_norms.items()}
        metrics = dict(list(metrics.items())[:max_keys])
        if not per_layer or not self.layers:
            return metrics
        names = [name for name, values in found.items() if values]
        room = min(len(self.layers), (max_keys - len(metrics)) // max(1, len(names)))
        for place in range(room):
            layer = self.layers[place * (len(self.layers) - 1) // max(1, room - 1)]
            own = {f"{prefix}/{layer.name}/{name}": getattr(layer, name) for name in names}
            metrics |= {key: value for key, value in own.items() if value is not None}
        return metrics

    def as_dict(self) -> dict[str, Any]:
        """The fields, for JSON."""
        return asdict(self)


class Diagnostics:
    """Measures routed layers (DSC, MoE, Mixture-of-LoRAs, PEER) around a training step.

    Works on any model that contains such layers: DSCGPT, converted models, and adapters::

        diagnostics = Diagnostics(model)
        for number, batch in enumerate(batches):
            if number % 100 == 0:
                diagnostics.begin()
            loss(batch).backward()
            optimizer.step()
            if number % 100 == 0:
                health = diagnostics.end()
                log(health.metrics())
            optimizer.zero_grad()

    Between :meth:`begin` and :meth:`end` hooks see the routers' inputs and selections. Other steps cost nothing. In a
    model compiled by ``torch.compile`` pass ``tokens=0``. With transformers' Trainer, use
    :class:`torchdsc.diagnostics.DiagnosticsCallback`.

    Args:
        model: Any module.
        tokens: Tokens of a measurement whose |dW|_2 is taken and whose routing is followed. With 0 no token is looked
            at: only atoms, bounds and gradients are.

    Raises:
        TypeError: If an argument has another type.
        ValueError: If ``tokens`` is negative, or the model has no routed layer.
    """

    def __init__(self, model: nn.Module, *, tokens: int = 64) -> None:
        check_types(Diagnostics.__init__, locals())
        check_at_least(0, tokens=tokens)
        found = [(name, layer) for name, layer in model.named_modules() if isinstance(layer, RoutedLayer)]
        if not found:
            raise ValueError(f"model must contain a routed layer, got {type(model).__name__} without one")
        self.model, self.tokens = model, tokens
        self._watches = [_Watch(name, layer, tokens) for name, layer in found]
        # Each bank once: layers may share it.
        self._banks = {
            id(bank): bank for bank in (getattr(layer, "bank", None) for _, layer in found) if bank is not None
        }
        self._before: dict[int, tuple[Tensor, Tensor]] = {}
        self._gradient_norms: dict[str, float] | None = None
        self._handles: list[Any] = []

    def begin(self) -> None:
        """Start a measurement, before the forward passes of a step."""
        self._drop_hooks()
        self._gradient_norms = None
        for watch in self._watches:
            self._handles += watch.start() if self.tokens else ()
        self._before = {key: followed_atoms(bank) for key, bank in self._banks.items()}

    def read_gradients(self) -> None:
        """Read the gradients now, where a loop frees them before :meth:`end`."""
        self._gradient_norms = _gradient_norms(self.model)

    @torch.no_grad()
    def end(self) -> ModelHealth:
        """End the measurement, after the optimizer's step.

        Returns:
            What was measured. Without a step in between atoms have not turned.
        """
        self._drop_hooks()
        gradients = _gradient_norms(self.model) if self._gradient_norms is None else self._gradient_norms
        banks = {key: measure_bank(bank, self._before.get(key)) for key, bank in self._banks.items()}
        self._before, self._gradient_norms = {}, None
        layers = [watch.result(banks.get(id(getattr(watch.layer, "bank", None)), {})) for watch in self._watches]
        return ModelHealth(layers, gradients)

    @contextmanager
    def measuring(self) -> Iterator[list[ModelHealth]]:
        """:meth:`begin` and :meth:`end` around a block; the list holds the result afterwards."""
        results: list[ModelHealth] = []
        self.begin()
        try:
            yield results
        finally:
            self._drop_hooks()
        results.append(self.end())

    def drop(self) -> None:
        """Give up a measurement that was begun, if there is one."""
        self._drop_hooks()
        self._before, self._gradient_norms = {}, None

    def _drop_hooks(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []


class _Watch:
    """What is seen of one layer."""

    def __init__(self, name: str, layer: RoutedLayer, tokens: int) -> None:
        self.name, self.layer, self.tokens = name, layer, tokens
        self.is_gated = isinstance(layer, DSC) and not isinstance(layer.router, NgramRouter)
        self.num_atoms: int = layer.options.num_atoms if isinstance(layer, DSC) else layer.num_experts  # type: ignore[assignment]
        self.used: Tensor | None = None
        self._reset()

    def _reset(self) -> None:
        self.counts: Tensor | None = None
        self.sums: dict[str, list[Tensor]] = {}
        self.seen = 0
        # Of a few tokens of the first call: what the router sees and selects, and what the layer sees.
        self.rows: Tensor | None = None
        self.selected: Tensor | None = None
        self.x: Tensor | None = None

    def start(self) -> list[Any]:
        """Hooks of the router and the layer."""
        self._reset()
        return [
            self.layer.router.register_forward_hook(self._see_routing, with_kwargs=True),
            self.layer.register_forward_pre_hook(self._see_x, with_kwargs=True),
        ]

    @torch.no_grad()
    def _see_routing(self, router: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        routed, indices, logits = args[0].detach(), output.indices, getattr(output, "logits", None)
        if self.rows is None and len(routed):
            self.rows, self.selected = self._few(routed), self._few(indices)
        mask = kwargs.get("token_mask")
        if mask is not None:
            indices, logits = indices[mask], None if logits is None else logits[mask]
        if indices.shape[0] == 0:
            return
        counts = torch.bincount(indices.reshape(-1), minlength=self.num_atoms)
        self.counts = counts if self.counts is None else self.counts + counts
        self.top_k = indices.shape[-1]
        self.seen += indices.shape[0]
        if self.is_gated:
            options: Any = self.layer.options
            assert logits is not None
            strength = gate(logits, logit_clamp=options.logit_clamp, eps=options.eps).strength
            gates = torch.tanh(strength / (indices.shape[-1] if options.gate == "mean" else 1))
            found = {"strength": strength.mean(), "clamped": (logits.abs() >= options.logit_clamp).float().mean()}
            if options.gate != "none":
                found |= {"gate": gates.mean(), "saturated": (gates > 0.999).float().mean()}
            for name, values in found.items():
                self.sums.setdefault(name, []).append(values * indices.shape[0])

    @torch.no_grad()
    def _see_x(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = args[0] if args else kwargs.get("x")
        if self.x is None and x is not None:
            self.x = self._few(x.detach())

    def _few(self, tokens: Tensor) -> Tensor:
        """A few evenly spaced ones, the same of any tensor for the same tokens."""
        flat = tokens.reshape(-1, tokens.shape[-1])
        places = torch.linspace(0, max(0, len(flat) - 1), min(self.tokens, len(flat)), device=flat.device)
        return flat[places.round().long()]

    def result(self, bank: dict[str, Any]) -> LayerHealth:
        """The layer's state; ``bank`` is what its bank has."""
        layer, measured = self.layer, dict(bank)
        top_k = layer.options.top_k if isinstance(layer, DSC) else getattr(self, "top_k", 1)
        if isinstance(layer, DSC):
            measured["certified_norm"] = certified_spectral_bound(layer)
        if self.counts is not None and self.rows is not None and self.selected is not None:
            share = self.counts.double() / self.counts.sum()
            used = share > 0
            self.used = used if self.used is None else self.used | used
            measured["utilization"] = float(used.double().mean())
            measured["effective_atoms"] = float(torch.special.entr(share).sum().exp())
            measured["unused"] = 1.0 - float(self.used.double().mean())
            measured["tokens"] = self.seen
            measured |= {name: float(sum(values)) / self.seen for name, values in self.sums.items()}
            if isinstance(layer, DSC) and self.rows.is_floating_point():
                # Mixed precision of FSDP holds in the forward pass alone.
                self.rows = self.rows.to(layer.parameter_dtype)
            with _evaluating(layer):
                if isinstance(layer, DSC):
                    measured["measured_norm"] = self._largest_norm(layer, self.rows)
                # Others may route otherwise in training, by noise or statistics of the batch.
                if self.is_gated:
                    now = layer.route(self.rows).indices
                    same = (now.unsqueeze(-1) == self.selected.unsqueeze(-2)).any(-1)
                    measured["agreement"] = float(same.double().mean())
            self._reset()
        kind = layer.options.gate if self.is_gated and isinstance(layer, DSC) else None
        return LayerHealth(self.name, self.num_atoms, top_k, gate_kind=kind, **measured)

    def _largest_norm(self, layer: DSC, rows: Tensor) -> float | None:
        x = self.x
        if x is None or x.shape[0] != rows.shape[0]:
            if layer.options.activation != "none":
                # Which latent values are rectified depends on it.
                return None
            x = torch.zeros(rows.shape[0], layer.in_features, device=rows.device)
        x = x.to(layer.parameter_dtype)
        finite = x.isfinite().all(-1) & rows.isfinite().all(-1)
        if not bool(finite.any()):
            return None
        left, right = layer.factors(x[finite], rows[finite])
        if not bool(left.isfinite().all() & right.isfinite().all()):
            return math.nan
        return float(spectral_norm(layer, x[finite], router_input=rows[finite]).max())


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode for a while."""
    modes = [(each, each.training) for each in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for each, mode in modes:
            each.training = mode


def _gradient_norms(model: nn.Module) -> dict[str, float]:
    kinds: dict[int, str] = {}
    for module in model.modules():
        kind = "atoms" if isinstance(module, BasisBank) else "router" if isinstance(module, Router) else None
        if kind is not None:
            kinds |= dict.fromkeys(map(id, module.parameters()), kind)
        if isinstance(module, DSC):
            kinds[id(module.gamma)] = "gamma"
    gradients: dict[str, list[Tensor]] = {}
    for parameter in model.parameters():
        if parameter.grad is not None:
            grad = parameter.grad.coalesce().values() if parameter.grad.is_sparse else parameter.grad
            gradients.setdefault(kinds.get(id(parameter), "other"), []).append(grad.detach())
    return {kind: float(get_total_norm(found)) for kind, found in sorted(gradients.items())}


def _known(values: Any) -> list[float]:
    return [value for value in values if value is not None]
