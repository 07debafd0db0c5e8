"""PEFT tuners, which put adapter layers into a model, and save and load them."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from peft.tuners.tuners_utils import (
    BaseTuner,
    BaseTunerLayer,
    _filter_state_dict_by_key_prefixes,
    _get_tuner_state_dict_key_prefixes,
)
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from transformers import GenerationConfig

from torchdsc.losses import add_regularization, leave_regularization
from torchdsc.nn import RoutedLayer
from torchdsc.nn.broadcast import broadcast_tokens, decoder_of, embedding_size
from torchdsc.nn.host import leave_attention_mask, leave_fused_encoder, pass_attention_mask

from .config import AdapterConfig, DSCAdapterConfig
from .dsc_layer import DSCAdapterLayer, adapted_modules, check_banks, hash_of_banks, without_lent_banks
from .files import check_keys, shared_keys, tell_embeddings
from .layer import BASE, NO_MERGE, AdapterLayer, MixtureOfLoRAsLayer, sizes_of
from .targets import find_targets


class AdapterModel(BaseTuner):
    """A model with adapters, in PEFT's form; made by ``peft.get_peft_model`` or ``model.add_adapter``."""

    tuner_layer_cls: type[AdapterLayer]
    target_module_mapping = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """See PEFT.

        Raises:
            ValueError: If ``adapter_name`` cannot be a module's name, or ``modules_to_save`` has names of adapters.
        """
        try:
            nn.ModuleDict({adapter_name: nn.Identity()})
        except (KeyError, TypeError) as error:
            raise ValueError(f"adapter_name must be a name that nn.ModuleDict takes, got {adapter_name!r}") from error
        heads = {name for config in self.peft_config.values() for name in config.modules_to_save or ()}
        if heads & {*self.peft_config}:
            raise ValueError(f"names of adapters must not be among modules_to_save, got {sorted(heads)}")
        # PEFT recognises an adapter's parameters by its name in theirs, which may match others: restore those.
        own = {id(part) for layer in _layers(model) for part in layer.parameters_of(adapter_name)}
        is_first = not any(isinstance(module, BaseTunerLayer) for module in model.modules())
        before = [] if is_first else [(part, part.requires_grad) for part in model.parameters() if id(part) not in own]
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        for part, requires_grad in before:
            part.requires_grad_(requires_grad)
        for layer in _layers(model):
            layer.keep_frozen()
        self._broadcast(adapter_name)

    def _broadcast(self, adapter_name: str) -> None:
        """Give the adapter the tokens, if its method uses them."""

    def _prepare_model(self, peft_config: AdapterConfig, model: nn.Module) -> None:
        """Check all targets before the first is replaced."""
        targets = find_targets(peft_config, model, self._check_target_module_exists)
        self._check_targets(peft_config, model, targets)

    def _check_targets(self, config: AdapterConfig, model: nn.Module, targets: dict[str, int]) -> None:
        """Refuse targets, given by name with their d_in, that this method cannot adapt."""

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
        """The first other layer of the same sizes with this adapter, whose bank and router may be shared."""
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
        # PEFT's method copies a weight to the restored module, which a whole MLP does not have.
        setattr(parent, child_name, new_module)
        if not isinstance(new_module, AdapterLayer):
            for layer in _layers(child):
                layer.leave()

    def _post_injection_hook(self, model: nn.Module, config: AdapterConfig, adapter_name: str) -> None:
        pass_attention_mask(model)
        leave_fused_encoder(model)
        add_regularization(model)

    def _check_merge_allowed(self) -> None:
        raise ValueError(NO_MERGE)

    def unload(self) -> nn.Module:
        """The base model without adapters."""
        model: nn.Module = super().unload()
        if not any(isinstance(module, RoutedLayer) for module in model.modules()):
            # A converted model keeps its own.
            leave_regularization(model)
        leave_attention_mask(model)
        return model

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """PEFT enters this around a call; it hands the ``adapter_names`` of a mixed batch to the layers."""
        names = kwargs.pop("adapter_names", None)
        if names is None:
            yield
            return
        if self.training:
            raise ValueError("adapter_names must be None in training, got a mixed batch")
        layers = [*_layers(self)]
        unknown = set(names) - {BASE} - {name for layer in layers for name in layer.adapters}
        if unknown:
            raise ValueError(f"adapter_names must name adapters of the model, got {sorted(unknown)}")
        expansion = _expansion(self.model, args, kwargs)

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
        # PEFT's method expects the name right before the parameter's, but a DSC layer has submodules.
        head, found, tail = key.rpartition(f".{cls.tuner_layer_cls.container}.{adapter_name}.")
        return f"{head}.{cls.tuner_layer_cls.container}.{tail}" if found else key

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: AdapterConfig,
        adapter_name: str,
        state_dict: dict[str, Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, Tensor]:
        prefixes = _get_tuner_state_dict_key_prefixes(model, adapter_name)
        own = _filter_state_dict_by_key_prefixes(dict(model.named_parameters()), prefixes)
        if any(f".{name}." in f".{key}." for name in unwanted_adapter_names for key in own):
            # PEFT has dropped every key that contains the name of another adapter.
            state_dict = {**model.state_dict(), **state_dict}
        found = _filter_state_dict_by_key_prefixes(state_dict, prefixes)
        # A bank or router that several targets share is saved once.
        return {key: value for key, value in found.items() if key not in shared_keys(model)}

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: AdapterConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        remapped: dict[str, Tensor] = super()._remap_adapter_state_dict_for_load(
            model, config, adapter_name, state_dict
        )
        prefixes = _get_tuner_state_dict_key_prefixes(model, adapter_name)
        expected = {*_filter_state_dict_by_key_prefixes(model.state_dict(), prefixes)} - {*shared_keys(model)}
        for name, module in model.named_modules():
            if isinstance(module, AuxiliaryTrainingWrapper):
                own = {f"{name}.{key}" for key in module.adapter_state_dict_load_map(adapter_name).values()}
                expected |= own
                if own:
                    # With a resized vocabulary, PEFT also saves the base's weights, and the trained ones twice.
                    inside = tuple(f"{name}.{kept}." for kept in ("original_module", "modules_to_save"))
                    remapped = {k: v for k, v in remapped.items() if k in own or not k.startswith(inside)}
        check_keys(expected - {*remapped}, tell_embeddings({*remapped} - expected, model))
        return remapped


class DSCAdapterModel(AdapterModel):
    """A model with DSC adapters."""

    prefix = "dsc_"
    tuner_layer_cls = DSCAdapterLayer

    def delete_adapter(self, adapter_name: str) -> None:
        """See PEFT; refuses an adapter whose banks others use before anything is deleted."""
        for layer in adapted_modules(self.model):
            layer.check_deletion(adapter_name)
        super().delete_adapter(adapter_name)

    def _cast_adapter_dtype(self, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        adapted = adapted_modules(self.model)
        layers = [each.adapters[adapter_name] for each in adapted if adapter_name in each.adapters]
        with without_lent_banks(layers):
            super()._cast_adapter_dtype(adapter_name, *args, **kwargs)

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: Any,
        adapter_name: str,
        state_dict: dict[str, Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, Tensor]:
        if config.bank_of is not None:
            # The config is saved next.
            config.bank_hash = hash_of_banks(model, adapter_name, state_dict)
        return super()._get_adapter_state_dict(model, config, adapter_name, state_dict, unwanted_adapter_names)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        check_banks(model, config, adapter_name)
        return super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)

    def _broadcast(self, adapter_name: str) -> None:
        config = self.peft_config[adapter_name]
        assert isinstance(config, DSCAdapterConfig)
        context = config.context()
        layers = [layer for layer in adapted_modules(self.model) if adapter_name in layer.adapters]
        if context.tokens_are_seen and layers:
            features = layers[0].in_features if context.embeddings_are_seen else None
            source = broadcast_tokens(self.model, features, context.past_tokens, context.orders_seen)
            for layer in layers:
                layer.listen(adapter_name, source)

    def _check_targets(self, config: AdapterConfig, model: nn.Module, targets: dict[str, int]) -> None:
        assert isinstance(config, DSCAdapterConfig)
        unknown = sorted({*(config.atom_counts or ())} - {*targets})
        if unknown:
            raise ValueError(f"atom_counts must be of targets, {[*targets]}, got {unknown}")
        for name in targets if config.bank_of is not None else ():
            layer = model.get_submodule(name)
            lenders = layer.lenders if isinstance(layer, DSCAdapterLayer) else {}
            if config.bank_of not in lenders:
                raise ValueError(
                    f"bank_of must be an adapter that {name!r} has, with a bank of its own, {[*lenders]}, got "
                    f"{config.bank_of!r}: load that one first, under this name"
                )
            if lenders[config.bank_of] != config.num_atoms:
                raise ValueError(
                    f"num_atoms must be that of the bank of {config.bank_of!r} at {name!r}, {lenders[config.bank_of]}, "
                    f"got {config.num_atoms}"
                )
        context = config.context()
        if not context.tokens_are_seen:
            return
        features = embedding_size(model) or next(iter(targets.values()), None)
        decoder = decoder_of(model)
        inside = {*decoder.modules()}
        for name, in_features in targets.items():
            if model.get_submodule(name) not in inside:
                raise ValueError(
                    f"target_modules must match modules inside {type(decoder).__name__}, whose call tells the "
                    f"tokens that router, router_input and input_context ask for, got {name!r}"
                )
            if context.embeddings_are_seen and in_features != features:
                raise ValueError(
                    f"target_modules must match modules of in_features = {features}, that of the embeddings which "
                    f"router_input and input_context ask for, got {name!r} of {in_features}"
                )


class MixtureOfLoRAsModel(AdapterModel):
    """A model with adapters that are mixtures of LoRAs."""

    prefix = "molora_"
    tuner_layer_cls = MixtureOfLoRAsLayer


def _expansion(model: nn.Module, args: tuple[Any, ...], options: dict[str, Any]) -> int:
    """How many sequences generation makes of each sample."""
    configs = (options.get("generation_config"), *args, getattr(model, "generation_config", None))
    config = next((given for given in configs if isinstance(given, GenerationConfig)), None)
    names = ("num_beams", "num_return_sequences")
    return max(options.get(name) or getattr(config, name, None) or 1 for name in names)


def _for_samples(names: list[str], samples: int, expansion: int) -> list[str]:
    """The adapter of each row of a batch, in which generation may have repeated every sample ``expansion`` times."""
    factor = samples // len(names)
    if factor not in (1, expansion) or factor * len(names) != samples:
        raise ValueError(f"adapter_names must name an adapter for each of {samples} samples, got {len(names)} names")
    return [name for name in names for _ in range(factor)]


def _layers(model: nn.Module) -> Iterator[AdapterLayer]:
    yield from (module for module in model.modules() if isinstance(module, AdapterLayer))
