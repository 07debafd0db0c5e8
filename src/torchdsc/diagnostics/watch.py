"""What a measurement sees of one routed layer, and what it makes of it."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from torchdsc.bounds import certified_spectral_bound, spectrum_of_factors
from torchdsc.nn import DSC, RoutedLayer
from torchdsc.nn.modes import evaluating
from torchdsc.nn.sharding import on_all_processes

from .bank import rank_of_spectrum
from .health import LayerHealth
from .routing import gates_of, is_gated, load_of, num_units, shared


class Watch:
    """What a measurement sees of one layer, by hooks of the layer and its router.

    Args:
        name: Of the layer.
        layer: The layer.
        tokens: Whose |dW|_2 is taken and whose routing is followed.
    """

    def __init__(self, name: str, layer: RoutedLayer, tokens: int) -> None:
        self.name, self.layer, self.tokens = name, layer, tokens
        self.is_gated, self.num_atoms = is_gated(layer), num_units(layer)
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
        self.seen += indices.shape[0]
        if self.is_gated:
            layer: Any = self.layer
            assert logits is not None
            strength, gates = gates_of(layer, logits)
            clamped = logits.abs() >= layer.options.logit_clamp
            found = {"strength": strength.mean(), "clamped": clamped.float().mean()}
            if gates is not None:
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

    def own_input(self) -> Tensor | None:
        """Of the few tokens, at least two, where the router sees it as the layer does, and it is finite."""
        x = self.x
        if x is None or self.rows is None or len(x) < 2 or not torch.equal(x, self.rows):
            return None
        return x if bool(x.isfinite().all()) else None

    def result(self, bank: dict[str, Any]) -> LayerHealth:
        """The layer's state; ``bank`` is what its bank has."""
        layer, measured = self.layer, dict(bank)
        # Of experts either the layer has it or its router.
        owners: tuple[Any, ...] = (layer.options,) if isinstance(layer, DSC) else (layer, layer.router)
        top_k = next(owner.top_k for owner in owners if hasattr(owner, "top_k"))
        if isinstance(layer, DSC):
            measured["certified_norm"] = certified_spectral_bound(layer)
        if self.counts is not None:
            _, measured["utilization"], measured["effective_atoms"] = load_of(self.counts)
            used = self.counts > 0
            self.used = used if self.used is None else self.used | used
            measured["unused"] = 1.0 - float(self.used.double().mean())
            measured["tokens"] = self.seen
            measured |= {name: float(sum(values)) / self.seen for name, values in self.sums.items()}
        if isinstance(layer, DSC):
            with evaluating(layer):
                measured |= self._of_few_tokens(layer)
        self._reset()
        kind = layer.options.gate if self.is_gated and isinstance(layer, DSC) else None
        return LayerHealth(self.name, self.num_atoms, top_k, gate_kind=kind, **measured)

    def _of_few_tokens(self, layer: DSC) -> dict[str, Any]:
        """What has to read the layer again: |dW|_2, and how the step has changed the routing."""
        rows, x = self.rows, self.x
        if rows is not None and rows.is_floating_point():
            # Mixed precision of FSDP holds in the forward pass alone.
            rows = rows.to(layer.parameter_dtype)
        if rows is not None and (x is None or x.shape[0] != rows.shape[0]):
            # Which latent values are rectified depends on it.
            is_needed = layer.options.activation != "none"
            x = None if is_needed else torch.zeros(rows.shape[0], layer.in_features, device=rows.device)
        finite = None
        if rows is not None and x is not None:
            x = x.to(layer.parameter_dtype)
            finite = x.isfinite().all(-1) & rows.isfinite().all(-1)
        found: dict[str, Any] = {}
        if on_all_processes(layer, finite is not None and bool(finite.any())):
            assert rows is not None
            assert x is not None
            left, right = layer.factors(x[finite], rows[finite])
            if bool(left.isfinite().all() & right.isfinite().all()):
                values = spectrum_of_factors(left, right)
                found["measured_norm"] = float(values.max())
                # A dW of zero has no rank.
                moved = values[values.amax(-1) > 0]
                if len(moved):
                    found["effective_rank_dw"] = float(rank_of_spectrum(moved.square()).mean())
            else:
                found["measured_norm"] = math.nan
        # Others may route otherwise in training, by noise or statistics of the batch.
        if on_all_processes(layer, self.is_gated and rows is not None):
            assert rows is not None
            assert self.selected is not None
            found["agreement"] = shared(layer.route(rows).indices, self.selected)
        return found
