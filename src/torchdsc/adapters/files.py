"""Checks of an adapter's folder before PEFT or transformers load it."""

import inspect
import json
import re
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any

from peft import PeftModel
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from safetensors import safe_open
from torch import nn
from transformers.integrations import PeftAdapterMixin

from torchdsc.nn import RoutedLayer
from torchdsc.nn.host import tied_keys

# Where PEFT keeps the base's module and the adapters', inside a module that modules_to_save names.
_INSIDE = r"(original_module|modules_to_save)\."

# What PEFT puts before the names of a model's parameters.
_PEFT_PREFIX = "base_model.model."

# For each method of this package, the attribute of a layer that holds its adapters.
_CONTAINERS: dict[str, str] = {}


def refuse_pickle(folder: str | Path, subfolder: str | None = None) -> None:
    """Raise a ValueError for a local folder that has its weights only as a pickle."""
    folder = Path(folder, subfolder or "")
    if (folder / WEIGHTS_NAME).is_file() and not (folder / SAFETENSORS_WEIGHTS_NAME).is_file():
        raise ValueError(
            f"{folder} must hold {SAFETENSORS_WEIGHTS_NAME}, got only {WEIGHTS_NAME}: pickled weights are not read"
        )


def check_keys(missing: Iterable[str], unexpected: Iterable[str]) -> None:
    """Raise a ValueError if weights of an adapter are missing, or others, such as the base model's, are there."""
    missing, unexpected = sorted(missing), sorted(unexpected)
    if missing or unexpected:
        raise ValueError(
            "the adapter's weights must be those of its config on this base model, got "
            f"{_some(missing)} missing and {_some(unexpected)} unexpected: another base model or config, or a damaged "
            "file. Weights of the base model are only taken from it for modules that modules_to_save names"
        )


def _some(keys: list[str]) -> str:
    return f"{len(keys)} ({', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''})" if keys else "none"


def watch_loading(method: str, container: str) -> None:
    """Check adapters of a method whenever they are loaded.

    This wraps the ``load_adapter`` of PEFT and transformers, which read weights before a method could check them.
    """
    if not _CONTAINERS:
        PeftModel.load_adapter = _watched(PeftModel.load_adapter, _by_peft)
        PeftAdapterMixin.load_adapter = _watched(PeftAdapterMixin.load_adapter, _by_transformers)
    _CONTAINERS[method] = container


def shared_keys(model: nn.Module) -> dict[str, str]:
    """Names of parameters that several targets share, each mapped to the name it is saved under."""
    return tied_keys((name, module) for name, module in model.named_modules() if isinstance(module, RoutedLayer))


def tell_embeddings(keys: Iterable[str], model: nn.Module) -> set[str]:
    """Warn of weights of a base's embeddings or head in an adapter's file; returns the other names.

    PEFT saves them where a vocabulary was resized, or adapters stand beside them, and takes them from the file.
    """
    keys, known = {*keys}, _embedding_keys(model)
    found = {key for key in keys if key.removeprefix(_PEFT_PREFIX) in known or key in known}
    if found:
        warnings.warn(
            f"the adapter's file has the base model's {', '.join(sorted(found))}, which replace those of this one, as "
            "PEFT saves them where a vocabulary was resized or an adapter stands beside them",
            stacklevel=2,
        )
    return keys - found


def _embedding_keys(model: nn.Module) -> set[str]:
    """Names of the weights of a model's embeddings and of its head, also where adapters stand beside these."""
    getters = (getattr(model, name, lambda: None) for name in ("get_input_embeddings", "get_output_embeddings"))
    found = {id(module) for getter in getters if (module := _embedding(getter)) is not None}
    places = [name for name, module in model.named_modules() if id(module) in found]
    inside = ("weight", "bias", "base_layer.weight", "base_layer.bias")
    return {f"{place}.{key}" for place in places for key in inside}


def _embedding(getter: Callable[[], nn.Module | None]) -> nn.Module | None:
    try:
        return getter()
    except (AttributeError, NotImplementedError):
        # What is no language model has none.
        return None


def _watched(load: Callable[..., Any], watch: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(load)
    def load_adapter(*args: Any, **kwargs: Any) -> Any:
        given = inspect.signature(load).bind(*args, **kwargs)
        given.apply_defaults()
        with watch(**given.arguments) as check:
            result = load(*args, **kwargs)
            check(result)
        return result

    return load_adapter


@contextmanager
def _by_peft(self: PeftModel, model_id: str, adapter_name: str, kwargs: Any, **_: Any) -> Iterator[Callable[..., None]]:
    # If the configuration was passed rather than read from the folder, the folder has not been checked yet.
    if adapter_name in self.peft_config and self.peft_config[adapter_name].peft_type in _CONTAINERS:
        refuse_pickle(model_id, kwargs.get("subfolder"))

    def check(info: Any) -> None:
        # A shared parameter is loaded under one of its names only, and a lent one by its own adapter.
        info.missing_keys[:] = [key for key in info.missing_keys if key not in shared_keys(self)]

    yield check


@contextmanager
def _by_transformers(
    self: nn.Module,
    peft_model_id: str | None,
    adapter_name: str | None,
    peft_config: Any,
    adapter_state_dict: Any,
    adapter_kwargs: dict[str, Any] | None,
    **_: Any,
) -> Iterator[Callable[..., None]]:
    folder = Path(peft_model_id or "", (adapter_kwargs or {}).get("subfolder") or "")
    config = {} if peft_config is None else vars(peft_config)
    if peft_config is None and (folder / CONFIG_NAME).is_file():
        config = json.loads((folder / CONFIG_NAME).read_text())
    container = _CONTAINERS.get(config.get("peft_type", ""))
    if container is None:
        yield lambda _: None
        return
    refuse_pickle(folder)
    keys: Iterable[str] = adapter_state_dict or ()
    if adapter_state_dict is None and (folder / SAFETENSORS_WEIGHTS_NAME).is_file():
        with safe_open(folder / SAFETENSORS_WEIGHTS_NAME, "pt") as weights:
            keys = [*weights.keys()]
    parts = [rf"{container}\.", *(rf"{name}\.(?!{_INSIDE})" for name in config.get("modules_to_save") or ())]
    own = re.compile(rf"(^|.*\.)({'|'.join(parts)})")
    check_keys((), tell_embeddings((key for key in keys if not own.match(key)), self))

    def check(info: Any) -> None:
        mine = f".{container}.{adapter_name or 'default'}."
        # A shared parameter is loaded under one of its names only.
        info.missing_keys = {*info.missing_keys} - {*shared_keys(self)}
        check_keys([key for key in info.missing_keys if mine in key], info.unexpected_keys)
        # transformers has replaced the parameters.
        adapted: Iterable[Any] = (module for module in self.modules() if hasattr(type(module), "keep_frozen"))
        for module in adapted:
            module.keep_frozen()

    yield check
