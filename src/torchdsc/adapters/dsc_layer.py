"""A target module with its DSC adapters: what they share, what is lent, and what stays as it is."""

import hashlib
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from torchdsc.nn import DSC, BasisBank, ContextOptions, DSCOptions
from torchdsc.nn.atom_rows import AtomRows
from torchdsc.nn.broadcast import Listener
from torchdsc.nn.host import layer_index
from torchdsc.nn.routers import set_salt
from torchdsc.nn.sharding import is_sharded, whole

from .config import AdapterConfig, DSCAdapterConfig
from .layer import AdapterLayer


@contextmanager
def without_lent_banks(layers: Iterable[nn.Module]) -> Iterator[None]:
    """Move and cast layers in the block without the banks that are other adapters'; then the layers get their dtype."""
    lent = {layer: layer.bank for layer in layers if isinstance(layer, ContextualDSC) and layer.borrows_bank}
    for layer in lent:
        del layer.bank
    try:
        yield
    finally:
        for layer, bank in lent.items():
            layer.to(bank.u.dtype)
            layer.bank = bank


class ContextualDSC(DSC, Listener):
    """A DSC layer with its short convolutions.

    Args:
        in_features: d_in.
        out_features: d_out.
        options: Of the layer.
        context: Of the short convolutions.
        bank: A bank to share; by default a new one.

    Attributes:
        freezes_rest: Whether all but atoms and their rows of the router stay as they are.
        borrows_bank: Whether the bank is another adapter's, and stays as it is.
        gamma_is_known: Whether it was looked at in training, where it stays as it is.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        options: DSCOptions,
        context: ContextOptions,
        bank: BasisBank | None = None,
    ) -> None:
        super().__init__(in_features, out_features, options, bank=bank)
        self.add_contexts(in_features, context)
        self.freezes_rest = self.borrows_bank = self.gamma_is_known = False

    def reset_parameters(self) -> None:
        """See :class:`torchdsc.DSC`; also initialises the short convolutions."""
        super().reset_parameters()
        for convolution in (self.router_context, self.input_context):
            if convolution is not None:
                convolution.reset_parameters()


class DSCAdapterLayer(AdapterLayer):
    """A target module with a :class:`torchdsc.DSC` for each adapter."""

    container = "dsc_layers"
    adapter_layer_names = ("dsc_layers",)

    def build(self, config: AdapterConfig, owner: nn.Module | None) -> DSC:
        """See :class:`AdapterLayer`."""
        assert isinstance(config, DSCAdapterConfig)
        bank = owner.bank if isinstance(owner, DSC) and config.share_bank else None
        if config.bank_of is not None:
            bank = cast(DSC, self.adapters[config.bank_of]).bank
        num_atoms, kept, *_ = (config.atom_counts or {}).get(self.target, (config.num_atoms, 0))
        options = replace(config.options(), num_atoms=num_atoms)
        layer = ContextualDSC(self.in_features, self.out_features, options, config.context(), bank)
        set_salt(layer.router, layer_index(self.target))
        if isinstance(owner, DSC) and config.share_router:
            layer.router = owner.router
        for part in (layer.router,) if config.bank_of is not None else (layer.bank, layer.router):
            if isinstance(part, AtomRows) and part.kept_atoms != kept:
                part.arrange(torch.arange(num_atoms, device=part.all_rows(part.atom_parameters[0]).device), kept)
        if config.atom_origins is not None and layer.bank.origin is None:
            layer.bank.origin = torch.zeros(num_atoms, dtype=torch.int64, device=layer.bank.u.device)
        layer.freezes_rest, layer.borrows_bank = config.freezes_rest, config.bank_of is not None
        if layer.borrows_bank:
            layer.bank.is_lent = True
        return layer

    @property
    def lenders(self) -> dict[str, int]:
        """M of the adapters that have a bank of their own, by name."""
        layers = {name: cast(ContextualDSC, layer) for name, layer in self.adapters.items()}
        return {name: layer.options.num_atoms for name, layer in layers.items() if not layer.borrows_bank}

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        with without_lent_banks([self.adapters[adapter_name]]):
            super()._move_adapter_to_device_of_base_layer(adapter_name, *args, **kwargs)

    def check_deletion(self, adapter_name: str) -> None:
        """Raise a ValueError for an adapter whose bank others use."""
        layers = {name: cast(ContextualDSC, layer) for name, layer in self.adapters.items()}
        if adapter_name not in layers or layers[adapter_name].borrows_bank:
            return
        bank = layers[adapter_name].bank
        users = [name for name, layer in layers.items() if name != adapter_name and layer.bank is bank]
        if users:
            raise ValueError(
                f"adapter_name must be an adapter whose bank no other uses, got {adapter_name!r} of {users}"
            )

    def delete_adapter(self, adapter_name: str) -> None:
        """See PEFT, and :meth:`check_deletion`."""
        self.check_deletion(adapter_name)
        layer = dict(self.adapters.items()).get(adapter_name)
        super().delete_adapter(adapter_name)
        if isinstance(layer, ContextualDSC) and layer.borrows_bank:
            self._return_bank(layer.bank)

    def _return_bank(self, bank: BasisBank) -> None:
        """Let the adapter that has lent a bank train it again, if no other uses it."""
        users = [cast(ContextualDSC, layer) for layer in self.adapters.values() if layer.bank is bank]
        if not any(layer.borrows_bank for layer in users):
            bank.is_lent = False
            bank.requires_grad_(any(layer.gamma.requires_grad for layer in users))
            self.keep_frozen()

    def _update(self, name: str, *args: Any, **kwargs: Any) -> Tensor:
        layer = cast(ContextualDSC, self.adapters[name])
        if self.training and layer.freezes_rest and not layer.gamma_is_known and not torch.compiler.is_compiling():
            layer.gamma_is_known = True
            if not bool(whole(layer.gamma).any()):
                warnings.warn(
                    f"atoms alone are trained of adapter {name!r} at {self.target!r}, and gamma is 0 there, so that "
                    "nothing can be learnt. atom_counts and atom_origins of a config are for loading what was saved: "
                    "leave them out of that of a new adapter",
                    RuntimeWarning,
                    stacklevel=2,
                )
        return super()._update(name, *args, **kwargs)

    def set_adapter(self, *args: Any, **kwargs: Any) -> None:
        """See PEFT, which lets all parameters of the active adapters be trained; what is kept stays so."""
        super().set_adapter(*args, **kwargs)
        self.keep_frozen()

    def set_requires_grad(self, *args: Any, **kwargs: Any) -> None:
        """See PEFT; what is kept stays so."""
        super().set_requires_grad(*args, **kwargs)
        self.keep_frozen()

    def keep_frozen(self) -> None:
        """Let no gradient reach kept atoms, lent banks, nor the other parameters where only atoms are trained."""
        for adapter in self.adapters.values():
            layer = cast(ContextualDSC, adapter)
            parts = [part for part in (layer.bank, layer.router) if isinstance(part, AtomRows)]
            rows = {id(getattr(part, name)) for part in parts for name in part.atom_parameters}
            kept = {id(getattr(part, f"kept_{name}", None)) for part in parts for name in part.atom_parameters}
            kept |= {id(parameter) for parameter in layer.bank.parameters()} if layer.bank.is_lent else set()
            for parameter in layer.parameters():
                if id(parameter) in kept or (layer.freezes_rest and id(parameter) not in rows):
                    parameter.requires_grad_(False)


def hash_of_banks(model: nn.Module, adapter_name: str, state_dict: dict[str, Tensor]) -> str | None:
    """A hash of the banks that an adapter uses, as a state dict of the model has them; None if that has not all."""
    digest, kinds = hashlib.sha256(), set[torch.dtype]()
    for name, module in model.named_modules():
        if not isinstance(module, DSCAdapterLayer) or adapter_name not in module.adapters:
            continue
        bank = cast(ContextualDSC, module.adapters[adapter_name]).bank
        # A state dict may have what is shared under one of its names.
        users = [user for user, layer in module.adapters.items() if layer.bank is bank]
        for part, _ in bank.named_parameters():
            keys = (f"{name}.{module.container}.{user}.bank.{part}" for user in users)
            rows = next((state_dict[key] for key in keys if key in state_dict), None)
            if rows is None or is_sharded(rows) or rows.is_meta:
                return None
            kinds.add(rows.dtype)
            digest.update(rows.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return f"{'-'.join(sorted(map(str, kinds)))} {digest.hexdigest()[:16]}"


def check_banks(model: nn.Module, config: DSCAdapterConfig, adapter_name: str) -> None:
    """Raise a ValueError if an adapter was saved over other banks than it finds. Those of another dtype may differ."""
    if config.bank_of is None or config.bank_hash is None:
        return
    found = hash_of_banks(model, adapter_name, model.state_dict())
    if found is not None and found != config.bank_hash and found.split()[0] == config.bank_hash.split()[0]:
        raise ValueError(
            f"the banks of {config.bank_of!r} must be those that the adapter {adapter_name!r} was trained over, got "
            "others: load the adapter that lent them under this name, as it was when this one was saved"
        )


def adapted_modules(model: nn.Module) -> list[DSCAdapterLayer]:
    """The target modules of a model's DSC adapters."""
    return [module for module in model.modules() if isinstance(module, DSCAdapterLayer)]


def dsc_layers(model: nn.Module, adapter_name: str) -> dict[str, ContextualDSC]:
    """A DSC adapter's layers by the names of their targets.

    Raises:
        ValueError: If the model has no DSC adapter of that name.
    """
    adapted = adapted_modules(model)
    found = {
        each.target: cast(ContextualDSC, each.adapters[adapter_name])
        for each in adapted
        if adapter_name in each.adapters
    }
    if not found:
        names = sorted({name for each in adapted for name in each.adapters})
        raise ValueError(f"adapter_name must be that of a DSC adapter of the model, {names}, got {adapter_name!r}")
    return found
