"""Measurements of routed layers around a training step."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from torchdsc.arguments import check_at_least, check_types
from torchdsc.nn import DSC, BasisBank, RoutedLayer, Router
from torchdsc.nn.sharding import is_sharded

from .bank import followed_atoms, measure_bank
from .health import ModelHealth
from .sensitivity import Sensitivity, has_sensitivity, sensitivity
from .watch import Watch


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
        self._watches = [Watch(name, layer, tokens) for name, layer in found]
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

    def sensitivities(self) -> dict[RoutedLayer, Sensitivity]:
        """How layers respond to their inputs, at a few tokens of their first call.

        Of those alone that :func:`torchdsc.diagnostics.sensitivity` takes, whose router sees the layer's own input, and
        of which no other process holds a part.
        To call between :meth:`begin` and :meth:`end`, after the optimizer's step: what is routed later is not measured.
        """
        self._drop_hooks()
        found: dict[RoutedLayer, Sensitivity] = {}
        for watch in self._watches:
            layer, x = watch.layer, watch.own_input()
            if not isinstance(layer, DSC) or x is None or not has_sensitivity(layer):
                continue
            if any(is_sharded(parameter) for parameter in layer.parameters()):
                continue
            # Of weights that a step has spoilt there is nothing to measure.
            if all(bool(parameter.isfinite().all()) for parameter in layer.parameters()):
                found[layer] = sensitivity(layer, x.to(layer.parameter_dtype))
        return found

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
