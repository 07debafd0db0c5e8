"""The tuners: they put adapter layers into a model, and save and load them."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from peft.tuners.tuners_utils import (
    BaseTuner,
    BaseTunerLayer,
    _maybe_include_all_linear_layers,
    check_target_module_exists,
)
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from torchdsc.nn.host import leave_attention_mask, leave_fused_encoder, pass_attention_mask

from .config import ALL_LINEAR, AdapterConfig
from .layer import BASE, NO_MERGE, AdapterLayer, DSCAdapterLayer, MixtureOfLoRAsLayer, sizes_of
from .loss import add_regularization, leave_regularization


class AdapterModel(BaseTuner):
    """A model with adapters, in PEFT's form; made by ``peft.get_peft_model`` or ``model.add_adapter``."""

    tuner_layer_cls: type[AdapterLayer]
    target_module_mapping = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    def _prepare_model(self, peft_config: AdapterConfig, model: nn.Module) -> None:
        """Refuse targets before the first is replaced."""
        if isinstance(peft_config.target_modules, str) and peft_config.target_modules.lower() == ALL_LINEAR:
            peft_config.target_modules = _all_linear(peft_config, model)
        targets: set[str] = set()
        for name, _ in model.named_modules():
            outer = [name[: match.start()] for match in re.finditer(r"\.", name)]
            if any(isinstance(model.get_submodule(other), BaseTunerLayer) for other in outer):
                continue
            if name and self._check_target_module_exists(peft_config, name):
                inside = next((other for other in outer if other in targets), None)
                if inside is not None:
                    raise ValueError(
                        f"target_modules must not match modules inside others that they match, got {name!r} inside "
                        f"{inside!r}"
                    )
                sizes_of(peft_config, model, name)
                targets.add(name)

    def _create_and_replace(
        self,
        peft_config: AdapterConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **kwargs: Any,
    ) -> None:
        layer = target
        if not isinstance(layer, self.tuner_layer_cls):
            layer = self.tuner_layer_cls(target, current_key, *sizes_of(peft_config, self.model, current_key))
        layer.update_layer(adapter_name, peft_config, self._owner(layer, adapter_name))
        if layer is not target:
            layer.train(target.training)
            self._replace_module(parent, target_name, layer, target)

    def _owner(self, layer: AdapterLayer, adapter_name: str) -> AdapterLayer | None:
        """The layer whose bank and router those of the same shape may share: the first."""
        sizes = (layer.in_features, layer.out_features)
        others = [module for module in self.model.modules() if isinstance(module, self.tuner_layer_cls)]
        for other in others:
            if (
                other is not layer
                and adapter_name in other.adapters
                and sizes == (other.in_features, other.out_features)
            ):
                return other
        return None

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        # PEFT's own copies a weight to the module put back, which a whole MLP has none of.
        setattr(parent, child_name, new_module)
        if not isinstance(new_module, AdapterLayer):
            for layer in child.modules():
                if isinstance(layer, AdapterLayer):
                    layer.leave()

    def _post_injection_hook(self, model: nn.Module, config: AdapterConfig, adapter_name: str) -> None:
        pass_attention_mask(model)
        leave_fused_encoder(model)
        add_regularization(model)

    def _check_merge_allowed(self) -> None:
        raise ValueError(NO_MERGE)

    def unload(self) -> nn.Module:
        """The base model without adapters."""
        leave_regularization(self.model)
        model: nn.Module = super().unload()
        leave_attention_mask(model)
        return model

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """What PEFT enters around a call: hands ``adapter_names`` of a mixed batch to the layers."""
        names = kwargs.pop("adapter_names", None)
        if names is None:
            yield
            return
        if self.training:
            raise ValueError("adapter_names must be None in training, got a mixed batch")
        layers = [module for module in self.modules() if isinstance(module, AdapterLayer)]
        unknown = set(names) - {BASE} - {name for layer in layers for name in layer.adapters}
        if unknown:
            raise ValueError(f"adapter_names must name adapters of the model, got {sorted(unknown)}")
        expansion = _expansion(self.model, kwargs)

        def give(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            x = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
            return args, {**kwargs, "adapter_names": _for_samples(names, x.shape[0], expansion)}

        heads = [module for module in self.modules() if isinstance(module, AuxiliaryTrainingWrapper)]
        handles = [module.register_forward_pre_hook(give, with_kwargs=True) for module in (*layers, *heads)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        # PEFT's own looks for the name in the last place but one; a DSC layer has modules of its own.
        container = re.escape(cls.tuner_layer_cls.container)
        found = re.sub(rf"(^|\.)({container})\.{re.escape(adapter_name)}\.", r"\1\2.", key)
        return found if found != key else super()._remove_adapter_name_from_key(key, adapter_name)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: AdapterConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        remapped: dict[str, Tensor] = super()._remap_adapter_state_dict_for_load(
            model, config, adapter_name, state_dict
        )
        expected = {key: value for key, value in model.state_dict().items() if cls._is_of(key, adapter_name)}
        given = {key for key in remapped if f".{cls.tuner_layer_cls.container}." in key}
        missing, unexpected = sorted(set(expected) - given), sorted(given - set(expected))
        if missing or unexpected:
            raise ValueError(
                "the adapter's weights must be those of its config on this base model, got "
                f"{_some(missing)} missing and {_some(unexpected)} unexpected: another base model or config, or a "
                "damaged file"
            )
        return remapped

    @classmethod
    def _is_of(cls, key: str, adapter_name: str) -> bool:
        return f".{cls.tuner_layer_cls.container}.{adapter_name}." in f".{key}"


class DSCAdapterModel(AdapterModel):
    """A model with DSC adapters."""

    prefix = "dsc_"
    tuner_layer_cls = DSCAdapterLayer


class MixtureOfLoRAsModel(AdapterModel):
    """A model with adapters that are mixtures of LoRAs."""

    prefix = "molora_"
    tuner_layer_cls = MixtureOfLoRAsLayer


def _all_linear(config: AdapterConfig, model: nn.Module) -> set[str]:
    """Names of all linear layers but the head, those that have adapters already included."""
    adapted = {
        name
        for name, module in model.named_modules()
        if isinstance(module, AdapterLayer) and isinstance(module.get_base_layer(), nn.Linear | Conv1D)
    }
    names: set[str] = _maybe_include_all_linear_layers(config, model).target_modules | adapted
    if config.layers_to_transform is None:
        return names
    # PEFT takes a name that is given in full whatever its layer.
    ends = {name: replace(config, target_modules=[name.rpartition(".")[2]]) for name in names if "." in name}
    chosen = {name for name, end in ends.items() if check_target_module_exists(end, name)}
    if not chosen:
        raise ValueError(
            f"layers_to_transform must be indices of layers with linear layers, got {config.layers_to_transform!r}"
        )
    return chosen


def _expansion(model: nn.Module, options: dict[str, Any]) -> int:
    """Samples that generation makes of each."""
    config = options.get("generation_config") or getattr(model, "generation_config", None)
    names = ("num_beams", "num_return_sequences")
    return max(options.get(name) or getattr(config, name, None) or 1 for name in names)


def _for_samples(names: list[str], samples: int, expansion: int) -> list[str]:
    """Adapter of each of ``samples``, which may be those of a batch or those that generation makes of them."""
    factor = samples // len(names)
    if factor not in (1, expansion) or factor * len(names) != samples:
        raise ValueError(f"adapter_names must name an adapter for each of {samples} samples, got {len(names)} names")
    return [name for name in names for _ in range(factor)]


def _some(keys: list[str]) -> str:
    return f"{len(keys)} ({', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''})" if keys else "none"
