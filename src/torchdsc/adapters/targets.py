"""Which modules of a model an adapter goes to."""

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer, _maybe_include_all_linear_layers, check_target_module_exists
from torch import nn
from transformers.pytorch_utils import Conv1D

from .config import ALL_LINEAR, AdapterConfig
from .layer import AdapterLayer, sizes_of


def find_targets(config: AdapterConfig, model: nn.Module, matches: Callable[..., Any]) -> dict[str, int]:
    """The targets of an adapter, by name with their d_in; "all-linear" becomes a set of names in ``config``.

    Args:
        config: Of the adapter.
        model: To be adapted; it may have adapters.
        matches: Whether a config matches a name, as PEFT tells.

    Raises:
        ValueError: If a target lies inside another, or inside a module that has an adapter, or its sizes are unknown.
        TypeError: If a target is no module that can be adapted.
    """
    if isinstance(config.target_modules, str) and config.target_modules.lower() == ALL_LINEAR:
        config.target_modules = _all_linear(config, model)
    targets: dict[str, int] = {}
    for name, _ in model.named_modules():
        if not name or not matches(config, name):
            continue
        outer = [name[: match.start()] for match in re.finditer(r"\.", name)]
        adapted = next((other for other in outer if isinstance(model.get_submodule(other), BaseTunerLayer)), None)
        if adapted is not None:
            _, found, own = name.partition(f"{adapted}.base_layer.")
            if found:
                # PEFT would leave it out, and say that it is not there if it finds no other.
                place = f"{own!r} inside {adapted!r}"
                raise ValueError(f"target_modules must not match modules inside one that has an adapter, got {place}")
            continue
        inside = next((other for other in outer if other in targets), None)
        if inside is not None:
            raise ValueError(
                f"target_modules must not match modules inside others that they match, got {name!r} inside {inside!r}"
            )
        targets[name], _ = sizes_of(config, model, name)
    return targets


def _all_linear(config: AdapterConfig, model: nn.Module) -> set[str]:
    """Names of all linear layers but the head, including those that already have adapters."""
    adapted = {
        name
        for name, module in model.named_modules()
        if isinstance(module, AdapterLayer) and isinstance(module.get_base_layer(), nn.Linear | Conv1D)
    }
    names: set[str] = _maybe_include_all_linear_layers(config, model).target_modules | adapted
    if config.layers_to_transform is None:
        return names
    # PEFT ignores layers_to_transform for full names: match by the last part.
    ends = {name: replace(config, target_modules=[name.rpartition(".")[2]]) for name in names if "." in name}
    chosen = {name for name, end in ends.items() if check_target_module_exists(end, name)}
    if not chosen:
        raise ValueError(
            f"layers_to_transform must be indices of layers with linear layers, got {config.layers_to_transform!r}"
        )
    return chosen
