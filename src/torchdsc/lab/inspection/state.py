"""What there is to say of a model's routed layers, measured once."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from torchdsc.diagnostics import (
    Diagnostics,
    Finding,
    LayerHealth,
    RoutingMonitor,
    Sensitivity,
    findings,
    slow_path,
)
from torchdsc.diagnostics.bank import spaced_atoms, spectrum
from torchdsc.lab.saved import Saved
from torchdsc.nn import DSC, BasisBank, RoutedLayer

# Points of a curve that are kept.
_POINTS = 200


@dataclass(frozen=True)
class LayerState:
    """A routed layer, with curves for figures: each is sorted from the largest to the smallest and thinned.

    Attributes:
        health: Its measurement.
        spectra: By "u" and "v", the squared singular values of the unit atoms in multiples of those of a tight frame.
        norms: By "u" and "v", the norms of the raw rows.
        scale: |scale gamma| of each channel.
        load: How often each atom is selected, in multiples of its even share.
        sensitivity: Of the layer to its input, at a few tokens; None without text, and where the router sees another
            input.
    """

    health: LayerHealth
    spectra: dict[str, list[float]]
    norms: dict[str, list[float]]
    scale: list[float]
    load: list[float]
    sensitivity: Sensitivity | None


@dataclass(frozen=True)
class Inspection:
    """A saved model or adapter.

    Attributes:
        title: What it is, and where.
        facts: Sizes and kinds, by name.
        layers: Its routed layers.
        findings: Signs of failure.
        num_tokens: Tokens of text that were routed; 0 for none.
    """

    title: str
    facts: dict[str, str]
    layers: list[LayerState]
    findings: list[Finding]
    num_tokens: int


def inspect(saved: Saved, *, text: str | None = None, window: int = 128, max_tokens: int = 8192) -> Inspection:
    """Measure a model, and its routing of a text if there is one.

    Args:
        saved: The model.
        text: To route.
        window: Tokens of a sequence; fewer where the model has fewer positions.
        max_tokens: Tokens of the text to route at most.

    Returns:
        The inspection.

    Raises:
        ValueError: If the model has no routed layer, or a text is given for a model without a tokenizer, or it is
            empty.
    """
    model = saved.model
    diagnostics = Diagnostics(model)
    is_encoder_decoder = getattr(model.config, "is_encoder_decoder", False)
    windows = [] if text is None else list(_windows(saved, text, window, max_tokens))
    with torch.no_grad(), RoutingMonitor(model) as monitor:
        diagnostics.begin()
        for ids in windows:
            model(input_ids=ids, **({"decoder_input_ids": ids} if is_encoder_decoder else {}))
    sensitivities, health = diagnostics.sensitivities(), diagnostics.end()
    routings = monitor.by_layer()
    layers: list[LayerState] = []
    for layer, measured in zip(_routed(model), health.layers, strict=True):
        bank = getattr(layer, "bank", None)
        spectra, norms = _curves(bank) if isinstance(bank, BasisBank) else ({}, {})
        scale = _sorted(layer.output_scale.detach().abs()) if isinstance(layer, DSC) else []
        load = [share * measured.num_atoms for share in routings[layer].load] if layer in routings else []
        layers.append(LayerState(measured, spectra, norms, scale, load, sensitivities.get(layer)))
    # No step has been taken, and what a gate does at the start is no matter of a trained model.
    found = [*findings(health, [health]), *filter(None, [slow_path(model)])]
    return Inspection(
        f"{saved.kind} in {saved.folder}", _facts(model), layers, found, sum(ids.numel() for ids in windows)
    )


def _routed(model: nn.Module) -> list[RoutedLayer]:
    return [module for module in model.modules() if isinstance(module, RoutedLayer)]


def _windows(saved: Saved, text: str, window: int, max_tokens: int) -> Iterator[Tensor]:
    if saved.tokenizer is None:
        raise ValueError(f"text needs a tokenizer, and there is none in {saved.folder}")
    ids = saved.tokenizer(text, return_tensors="pt", verbose=False)["input_ids"][0][:max_tokens]
    if not ids.numel():
        raise ValueError("text must have at least one token, got none")
    window = min(window, getattr(saved.model.config, "max_position_embeddings", window))
    for part in ids.split(window):
        yield part[None]


def _curves(bank: BasisBank) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Spectra of the unit atoms and norms of the raw rows."""
    spectra: dict[str, list[float]] = {}
    norms: dict[str, list[float]] = {}
    for side, unit, raw in zip("uv", spaced_atoms(bank), (bank.all_rows("u"), bank.all_rows("v")), strict=True):
        values = spectrum(unit)
        spectra[side] = [] if values is None else _sorted(values / values.mean())
        norms[side] = _sorted(raw.detach().float().norm(dim=1))
    return spectra, norms


def _sorted(values: Tensor) -> list[float]:
    """From the largest to the smallest, at most so many evenly spaced points."""
    values = values.flatten().sort(descending=True).values.float()
    if len(values) > _POINTS:
        # Between places, so that the ends are kept.
        values = functional.interpolate(values[None, None], size=_POINTS, mode="linear", align_corners=True)[0, 0]
    return [float(value) for value in values]


def _facts(model: Any) -> dict[str, str]:
    routed = _routed(model)
    own = {id(p): p for layer in routed for p in layer.parameters()}
    total = sum(parameter.numel() for parameter in model.parameters())
    banks = {id(layer.bank) for layer in routed if isinstance(layer, DSC)}
    facts = {
        "Routed layers": f"{len(routed)}, {', '.join(sorted({type(layer).__name__ for layer in routed}))}",
        "Parameters": f"{total:,}",
        "Of routed layers": f"{sum(p.numel() for p in own.values()):,}",
        "Dtype": ", ".join(sorted({str(p.dtype).removeprefix("torch.") for p in own.values()})),
    }
    if banks:
        facts["Banks"] = f"{len(banks)}" if len(banks) == len(routed) else f"{len(banks)}, shared"
        routers = sorted({layer.options.router for layer in routed if isinstance(layer, DSC)})
        facts["Routers"] = ", ".join(routers)
    return facts
