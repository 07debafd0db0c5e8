"""Atoms of DSC adapters as things one can count, keep, add and remove."""

import copy
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from torchdsc.arguments import check_at_least
from torchdsc.nn import DSC, BasisBank
from torchdsc.nn.atom_rows import AtomRows
from torchdsc.nn.modes import evaluating
from torchdsc.nn.sharding import whole

from .config import DSCAdapterConfig
from .dsc_layer import ContextualDSC, adapted_modules, dsc_layers

Masks = Mapping[str, Tensor]
"""By the name of a target module, a bool of shape (M,)."""


def atoms_used_by(
    model: nn.Module, batches: Iterable[Mapping[str, Any]], *, adapter_name: str = "default"
) -> dict[str, Tensor]:
    """Count how often each atom of a DSC adapter is selected.

    Args:
        model: With the adapter, which must be active.
        batches: Keyword arguments of the model's calls, such as ``{"input_ids": ids, "attention_mask": mask}``. Tokens
            that are masked do not count.
        adapter_name: Of the adapter.

    Returns:
        By the name of each target module counts of shape (M,), int64, on the CPU. Targets that share a router have the
        counts of all of them.

    Raises:
        TypeError: If a batch is no mapping.
        ValueError: If the model has no DSC adapter of that name, or a target saw no token.
    """
    layers = dsc_layers(model, adapter_name)
    counts = {name: torch.zeros(layer.options.num_atoms, dtype=torch.int64) for name, layer in layers.items()}

    def count(name: str) -> Any:
        def hook(_: nn.Module, args: Any, kwargs: dict[str, Any], selection: Any) -> None:
            mask, indices = kwargs.get("token_mask"), selection.indices
            seen = indices if mask is None else indices[mask]
            counts[name] += torch.bincount(seen.reshape(-1), minlength=len(counts[name])).cpu()

        return hook

    with ExitStack() as stack, torch.no_grad(), evaluating(model):
        for name, layer in layers.items():
            handle = layer.router.register_forward_hook(count(name), with_kwargs=True)
            stack.callback(handle.remove)
        for batch in batches:
            if not isinstance(batch, Mapping):
                raise TypeError(
                    "batches must hold mappings of the model's arguments, such as {'input_ids': ids}, got a "
                    f"{type(batch).__name__} in a {type(batches).__name__}"
                )
            model(**batch)
    unseen = [name for name, found in counts.items() if not found.any()]
    if unseen:
        raise ValueError(
            f"batches must run every target of adapter {adapter_name!r}, which must be active, got no token at {unseen}"
        )
    return counts


def freeze_atoms(model: nn.Module, atoms: Masks, *, adapter_name: str = "default") -> None:
    """Keep some atoms of a DSC adapter as they are, with their rows of the router; training goes on with the others.

    They become the first atoms of their bank, so that masks and counts made before do not fit any more. Outputs stay
    the same up to rounding. The parameters are new ones: make the optimizer afterwards.

    Args:
        model: With the adapter.
        atoms: By the name of a target module, a bool of shape (M,), such as ``counts > 0`` of :func:`atoms_used_by`. Of
            targets that share a bank or a router, those of any are kept.
        adapter_name: Of the adapter.

    Raises:
        TypeError: If a mask is no bool tensor.
        ValueError: If the model has no such adapter or target, a mask has another shape, its router has no rows of
            atoms (product keys, n-grams), its gradients are sparse, or no atom would be left to train.
    """
    layers, config = _changeable(model, adapter_name)
    marked = _checked(layers, atoms)
    groups = {tuple(group): torch.stack([marked[name] for name in group]).any(0) for group in _groups(layers)}
    for names, chosen in groups.items():
        chosen[: layers[names[0]].bank.kept_atoms] = True
        if chosen.all():
            raise ValueError(f"atoms must leave one to train at {[*names]}, got all {len(chosen)}")
    frozen = _frozen(config, layers)
    for names, chosen in groups.items():
        # Those of earlier origins are kept anyway.
        last = _origins(layers[names[0]]) == len(frozen[names[0]]) - 1
        for name in names:
            frozen[name][-1] = int((chosen & last).sum())
        # Stable: the others stay in their order.
        order = torch.argsort(chosen.logical_not(), stable=True)
        _arrange(layers, [*names], order, int(chosen.sum()))
    _note(model, adapter_name, config, layers, frozen)


def add_atoms(model: nn.Module, count: int, *, origin: str, adapter_name: str = "default") -> None:
    """Add atoms to a DSC adapter, for something new to learn; all that it has learnt is kept as it is.

    From then on only the new atoms and their rows of the router are trained; gamma, norms, projections and short
    convolutions are kept too. The new atoms are copies of present ones with some noise, so that they are selected
    where those are. :func:`remove_atoms` restores the outputs of before, bit for bit. The parameters are new ones: make
    the optimizer afterwards.

    Args:
        model: With the adapter.
        count: Atoms to add to each bank, >= 1.
        origin: A name for what they learn. Saved adapters have it in their config, as one of ``atom_origins``, and the
            index of each atom's as ``bank.origin``.
        adapter_name: Of the adapter.

    Raises:
        TypeError: If ``count`` is no int.
        ValueError: If the model has no such adapter, or that has learnt nothing, trains other modules too
            (``modules_to_save``) or was loaded for inference; there are atoms of that origin; the router has no rows of
            atoms (product keys, n-grams); gradients are sparse; or other adapters use its banks.
    """
    check_at_least(1, count=count)
    layers, config = _changeable(model, adapter_name)
    origins = list(config.atom_origins or ["first"])
    if origin in origins:
        raise ValueError(f"origin must be a new name, got {origin!r} of {origins}")
    if config.modules_to_save is not None:
        raise ValueError(
            "modules_to_save must be None, as these modules would go on training (a task_type of classifiers sets it), "
            f"got {config.modules_to_save}"
        )
    if config.inference_mode:
        raise ValueError("inference_mode must be False, got True: load the adapter with is_trainable=True")
    if not any(bool((whole(layer.gamma) != 0).any()) for layer in layers.values()):
        raise ValueError(
            "gamma must not be 0, as new atoms act through the gamma that is there, got 0 everywhere: train the "
            "adapter first, or give it more atoms at once"
        )
    frozen = {name: [*counts, 0] for name, counts in _frozen(config, layers).items()}
    for group in _groups(layers):
        present = layers[group[0]].options.num_atoms
        for bank in _banks(layers, group):
            if bank.origin is None:
                bank.origin = torch.zeros(present, dtype=torch.int64, device=bank.u.device)
        _arrange(layers, group, torch.cat([torch.arange(present), torch.randint(present, (count,))]), present, count)
        for bank in _banks(layers, group):
            assert bank.origin is not None
            bank.origin[present:] = len(origins)
    config.atom_origins = [*origins, origin]
    _note(model, adapter_name, config, layers, frozen)


def remove_atoms(
    model: nn.Module, atoms: Masks | None = None, *, origin: str | None = None, adapter_name: str = "default"
) -> None:
    """Remove atoms of a DSC adapter, with their rows of the router: those of a mask, or of an origin.

    Where only the atoms of the last :func:`add_atoms` are removed, outputs are those from before it, bit for bit, and
    what was trained then is trained again: the atoms of the origin before, without those that :func:`freeze_atoms`
    keeps; and the rest of the adapter where it is the only origin left. An origin without atoms is free for others.
    The parameters are new ones: make the optimizer afterwards.

    Args:
        model: With the adapter.
        atoms: By the name of a target module, a bool of shape (M,). Of targets that share a bank or a router, those
            that all of them mark are removed.
        origin: One of ``atom_origins``, in place of ``atoms``.
        adapter_name: Of the adapter.

    Raises:
        TypeError: If a mask is no bool tensor.
        ValueError: If neither or both are given, the model has no such adapter, target or origin, a mask has another
            shape, its router has no rows of atoms (product keys, n-grams), or fewer than K atoms would be left, or none
            to train.
    """
    if (atoms is None) == (origin is None):
        raise ValueError(f"either atoms or origin must be given, got atoms = {atoms!r} and origin = {origin!r}")
    layers, config = _changeable(model, adapter_name)
    origins = list(config.atom_origins or ["first"])
    if origin is not None:
        if origin not in origins:
            raise ValueError(f"origin must be one of {origins}, got {origin!r}")
        atoms = {name: _origins(layer) == origins.index(origin) for name, layer in layers.items()}
    marked = _checked(layers, cast(Masks, atoms))
    groups = {tuple(group): torch.stack([marked[name] for name in group]).all(0) for group in _groups(layers)}
    for names, gone in groups.items():
        count, top_k = int((~gone).sum()), layers[names[0]].options.top_k
        if count < top_k:
            raise ValueError(f"top_k = {top_k} atoms must be left at {[*names]}, got {count}")
    left = [_origins(layers[names[0]])[~gone] for names, gone in groups.items()]
    used = torch.cat(left).unique().tolist()
    frozen = _frozen(config, layers)
    kept: dict[tuple[str, ...], int] = {}
    for (names, gone), origins_left in zip(groups.items(), left, strict=True):
        before, counts = _origins(layers[names[0]]), frozen[names[0]]
        # In each origin, what freeze_atoms keeps comes first.
        still = [int((~gone[before == index][: counts[index]]).sum()) for index in used]
        kept[names] = int((origins_left != used[-1]).sum()) + still[-1]
        if kept[names] == len(origins_left):
            raise ValueError(f"atoms must leave one to train at {[*names]}, got none beside {kept[names]} kept ones")
        frozen |= {name: list(still) for name in names}
    for names, gone in groups.items():
        _arrange(layers, [*names], torch.nonzero(~gone).squeeze(1), kept[names])
    if config.atom_origins is not None:
        _forget_origins(config, layers, used)
    _note(model, adapter_name, config, layers, frozen)


def _changeable(model: Any, adapter_name: str) -> tuple[dict[str, ContextualDSC], DSCAdapterConfig]:
    """The layers and the config of an adapter whose banks no other one uses.

    The config is the model's own from here on: the one that was given to PEFT may be of several adapters.
    """
    layers = dsc_layers(model, adapter_name)
    own = {id(layer.bank) for layer in layers.values()}
    others = {
        name
        for module in adapted_modules(model)
        for name, layer in module.adapters.items()
        if name != adapter_name and id(cast(ContextualDSC, layer).bank) in own
    }
    if others:
        raise ValueError(f"banks must be those of adapter {adapter_name!r} alone, got {sorted(others)} with the same")
    if any(layer.bank.mesh is not None for layer in layers.values()):
        raise ValueError(
            f"banks of adapter {adapter_name!r} must be whole to change their atoms, got one over processes"
        )
    configs = getattr(model, "peft_config", None)
    if configs is None:
        raise ValueError(f"model must be a PEFT model or one of transformers with adapters, got {type(model).__name__}")
    configs[adapter_name] = copy.deepcopy(configs[adapter_name])
    return layers, configs[adapter_name]


def _checked(layers: Mapping[str, DSC], masks: Masks) -> dict[str, Tensor]:
    unknown = sorted({*masks} - {*layers})
    if unknown:
        raise ValueError(f"atoms must be masks of the adapter's targets, {[*layers]}, got {unknown}")
    for name, mask in masks.items():
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            kind = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
            raise TypeError(f"atoms[{name!r}] must be a bool tensor, got {kind}")
        if mask.shape != (layers[name].options.num_atoms,):
            raise ValueError(
                f"atoms[{name!r}] must have the shape {(layers[name].options.num_atoms,)}, got {tuple(mask.shape)}"
            )
    return {
        name: masks[name].cpu() if name in masks else torch.zeros(layer.options.num_atoms, dtype=torch.bool)
        for name, layer in layers.items()
    }


def _groups(layers: Mapping[str, DSC]) -> Iterator[list[str]]:
    """Names of layers that share a bank or a router, directly or by way of others."""
    for name, layer in layers.items():
        if not isinstance(layer.router, AtomRows):
            raise ValueError(f"router must be 'linear' or 'low_rank', got {layer.options.router!r} at {name}")
        if layer.options.sparse_gradients:
            raise ValueError(f"sparse_gradients must be False, got True at {name}")
    groups: list[tuple[set[int], list[str]]] = []
    for name, layer in layers.items():
        parts, names = {id(layer.bank), id(layer.router)}, [name]
        for other in [group for group in groups if group[0] & parts]:
            groups.remove(other)
            parts, names = parts | other[0], [*other[1], *names]
        groups.append((parts, names))
    yield from (names for _, names in groups)


def _banks(layers: Mapping[str, DSC], names: list[str]) -> list[BasisBank]:
    return [*{id(layers[name].bank): layers[name].bank for name in names}.values()]


def _origins(layer: DSC) -> Tensor:
    """The index of each atom's origin, on the CPU; ascending, as what is added comes last."""
    origin = layer.bank.origin
    return torch.zeros(layer.options.num_atoms, dtype=torch.int64) if origin is None else origin.cpu()


def _frozen(config: DSCAdapterConfig, layers: Mapping[str, DSC]) -> dict[str, list[int]]:
    """By target, how many atoms of each origin, its first, freeze_atoms keeps."""
    none = [0] * len(config.atom_origins or [""])
    return {name: list((config.atom_counts or {}).get(name, [])[2:]) or list(none) for name in layers}


def _arrange(layers: Mapping[str, DSC], names: list[str], atoms: Tensor, kept: int, copies: int = 0) -> None:
    """Choose and order the atoms of layers that share parts, each part once."""
    parts = {id(part): part for name in names for part in (layers[name].bank, layers[name].router)}
    for part in parts.values():
        assert isinstance(part, AtomRows)
        part.arrange(atoms.to(next(part.parameters()).device), kept, copies)
    for bank in _banks(layers, names):
        if bank.origin is not None:
            bank.origin = bank.origin[atoms.to(bank.origin.device)]
    for name in names:
        layers[name].options = replace(layers[name].options, num_atoms=len(atoms))


def _forget_origins(config: DSCAdapterConfig, layers: Mapping[str, DSC], used: list[int]) -> None:
    """Drop the names but those of which an atom is left."""
    origins = config.atom_origins or []
    config.atom_origins = [origins[index] for index in used]
    for bank in _banks(layers, [*layers]):
        if bank.origin is not None:
            places = torch.tensor([used.index(index) for index in bank.origin.tolist()], device=bank.origin.device)
            bank.origin = places.to(torch.int64)


def _note(
    model: nn.Module,
    adapter_name: str,
    config: DSCAdapterConfig,
    layers: Mapping[str, ContextualDSC],
    frozen: Mapping[str, list[int]],
) -> None:
    """Write the sizes into the adapter's config, by which a saved adapter is built again, and freeze what is kept."""
    config.atom_counts = {
        name: [layer.options.num_atoms, layer.bank.kept_atoms, *frozen[name]] for name, layer in layers.items()
    }
    is_trained = not config.inference_mode and any(
        adapter_name in each.active_adapters for each in adapted_modules(model)
    )
    for layer in layers.values():
        if layer.freezes_rest and not config.freezes_rest and is_trained:
            layer.requires_grad_(True)
        layer.freezes_rest = config.freezes_rest
    for module in adapted_modules(model):
        module.keep_frozen()
