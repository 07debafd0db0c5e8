"""Loading of converted Hugging Face models."""

import json
import re
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from .api import convert
from .saving import CONVERSIONS, REDIRECTION, converted_class

_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
# Of from_pretrained's arguments, those that say where on the hub a file is.
_HUB_OPTIONS = {"cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token"}


def load_converted(folder: str | Path, *, model_class: type[nn.Module] | None = None, **options: Any) -> Any:
    """Load a Hugging Face model that was saved after :func:`torchdsc.convert`.

    Args:
        folder: Where ``save_pretrained`` or Trainer saved it, or the name of a model on the hub.
        model_class: The model's class before conversion; by default the transformers class that config.json names.
        **options: Arguments of ``from_pretrained``: ``dtype``, ``device_map``, ``attn_implementation``, ``revision``,
            ``token`` and so on.

    Returns:
        The model in evaluation mode, with its converted layers.

    Raises:
        FileNotFoundError: If ``folder`` holds no config.json, or is a name that the hub does not know or cannot be
            asked for.
        OSError: If it holds no weights in safetensors.
        ValueError: If it holds no converted model, transformers has no class of its name, or weights are missing or
            belong to another model.
    """
    import transformers

    path = Path(folder, "config.json")
    if isinstance(folder, str) and _HUB_NAME.fullmatch(folder) and not Path(folder).is_dir():
        path = _from_hub(folder, {name: value for name, value in options.items() if name in _HUB_OPTIONS})
    settings = json.loads(path.read_text(encoding="utf-8"))
    conversions = settings.pop(CONVERSIONS, None)
    if not conversions:
        raise ValueError(f"folder must hold a model that torchdsc.convert has converted, got {str(folder)!r}")
    if not isinstance(conversions, list) or not all(_is_conversion(each) for each in conversions):
        raise ValueError(
            f"{CONVERSIONS} in {str(path)!r} must be what torchdsc.convert has written, got {conversions!r}"
        )
    settings.pop(REDIRECTION, None)
    config = transformers.AutoConfig.for_model(**settings)
    name = (settings.get("architectures") or ["none"])[0]
    model_class = getattr(transformers, name, None) if model_class is None else model_class
    if not (isinstance(model_class, type) and issubclass(model_class, transformers.PreTrainedModel)):
        raise ValueError(f"model_class must be given for a model that is not one of transformers' own, got {name!r}")
    cls = _loading_class(model_class, conversions)
    # Pickled weights are not read.
    options = {**options, "config": config, "output_loading_info": True, "use_safetensors": True}
    model, report = cls.from_pretrained(folder, **options)
    wrong = {name: sorted(map(str, report[name])) for name in ("missing_keys", "unexpected_keys") if report.get(name)}
    if wrong:
        raise ValueError(f"the weights in {str(folder)!r} must be those of its config, got {wrong}")
    model.__class__ = converted_class(model_class)
    return model


def _from_hub(name: str, options: dict[str, Any]) -> Path:
    """The config of a model on the hub, in the local cache."""
    from transformers.utils.hub import cached_file

    try:
        return Path(cached_file(name, "config.json", **options))
    except OSError as error:
        raise FileNotFoundError(
            f"folder must be a folder, or the name of a model on the hub or in its cache, got {name!r}"
        ) from error


def _loading_class(cls: Any, conversions: list[dict[str, Any]]) -> Any:
    """A subclass of ``cls`` that converts itself when built, before weights are loaded."""

    def init(self: Any, config: Any, *args: Any, **options: Any) -> None:
        cls.__init__(self, config, *args, **options)
        names = {name for name, _ in self.named_modules()}
        unknown = sorted({name for conversion in conversions for name in conversion["modules"]} - names)
        if unknown:
            raise ValueError(
                f"{CONVERSIONS} must name modules of {cls.__name__}, got {unknown}: convert the model that is saved, "
                "not one inside it"
            )
        for conversion in conversions:
            convert(self, target=partial(_is_among, conversion["modules"]), **conversion["arguments"])
        self.__class__ = loading

    loading = type(cls.__name__, (cls,), {"__init__": init, "__module__": cls.__module__})
    return loading


def _is_conversion(value: Any) -> bool:
    return isinstance(value, dict) and value.keys() == {"modules", "arguments"} and isinstance(value["arguments"], dict)


def _is_among(names: list[str], name: str, module: nn.Module) -> bool:
    return name in names
