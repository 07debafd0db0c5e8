"""Saving of converted Hugging Face models, and loading them again."""

import json
from functools import partial
from pathlib import Path
from typing import Any, cast

from torch import nn

from torchdsc.losses.host import is_pretrained

# In config.json: what was converted.
CONVERSIONS = "torchdsc_conversions"
# In config.json: where transformers looks for weights. No such file exists, so that a loader stops that would leave out
# what was put into the model, and start its feed-forward modules anew.
_REDIRECTION = "transformers_weights"
_NO_FILE = "to-be-loaded-by-torchdsc.load_converted.safetensors"


def remember_conversion(model: nn.Module, conversion: dict[str, Any]) -> None:
    """Let ``save_pretrained`` of a Hugging Face model write down a conversion for :func:`load_converted`.

    Args:
        model: The converted model; others than Hugging Face's are left as they are.
        conversion: Arguments of :func:`torchdsc.convert`.
    """
    if not is_pretrained(model):
        return
    if not isinstance(model, _Converted):
        model.__class__ = _converted_class(type(model))
    config: Any = model.config
    setattr(config, CONVERSIONS, [*getattr(config, CONVERSIONS, []), conversion])


def load_converted(folder: str | Path, *, model_class: type[nn.Module] | None = None, **options: Any) -> Any:
    """Load a Hugging Face model that was saved after :func:`torchdsc.convert`.

    Args:
        folder: Where ``save_pretrained``, or Trainer, has saved it.
        model_class: Class of the model before its conversion; by default that of transformers which config.json names.
        **options: Of transformers' ``from_pretrained``: ``dtype``, ``device_map``, ``attn_implementation`` and so on.

    Returns:
        The model in evaluation mode, with its converted layers.

    Raises:
        FileNotFoundError: If ``folder`` holds no config.json.
        OSError: If it holds no weights in safetensors.
        ValueError: If it holds no converted model, transformers has no class of its name, or weights are missing or
            belong to another model.
    """
    import transformers

    path = Path(folder, "config.json")
    settings = json.loads(path.read_text(encoding="utf-8"))
    conversions = settings.pop(CONVERSIONS, None)
    if not conversions:
        raise ValueError(f"folder must hold a model that torchdsc.convert has converted, got {str(folder)!r}")
    if not isinstance(conversions, list) or not all(_is_conversion(each) for each in conversions):
        raise ValueError(
            f"{CONVERSIONS} in {str(path)!r} must be what torchdsc.convert has written, got {conversions!r}"
        )
    settings.pop(_REDIRECTION, None)
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
    model.__class__ = _converted_class(model_class)
    return model


class _Converted:
    """Put before the class of a model, it saves what was converted beside the weights."""

    def save_pretrained(self, save_directory: str | Path, *args: Any, **options: Any) -> None:
        """See transformers; config.json then says what :func:`load_converted` has to convert."""
        if options.get("push_to_hub"):
            raise ValueError(
                "push_to_hub must be False for a converted model, got True: save it, and upload the folder"
            )
        super().save_pretrained(save_directory, *args, **options)  # type: ignore[misc]
        path = Path(save_directory, "config.json")
        if path.is_file():
            settings = json.loads(path.read_text(encoding="utf-8"))
            settings[_REDIRECTION] = _NO_FILE
            path.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # The class is made here, not found in a module: a pickle names the one it was made of.
        _, _, *state = cast(tuple[Any, ...], super().__reduce_ex__(2))
        return (_blank, (type(self).__mro__[2],), *state)


def _blank(cls: type[nn.Module]) -> Any:
    made = _converted_class(cls)
    return made.__new__(made)


def _is_conversion(value: Any) -> bool:
    return isinstance(value, dict) and value.keys() == {"modules", "arguments"} and isinstance(value["arguments"], dict)


def _is_among(names: list[str], name: str, module: nn.Module) -> bool:
    return name in names


_converted_classes: dict[type, Any] = {}


def _converted_class(cls: type) -> Any:
    """``cls`` with another ``save_pretrained``, under the same name: transformers goes by names."""
    if cls not in _converted_classes:
        attributes = {"__module__": cls.__module__, "__doc__": cls.__doc__}
        _converted_classes[cls] = type(cls.__name__, (_Converted, cls), attributes)
    return _converted_classes[cls]


def _loading_class(cls: Any, conversions: list[dict[str, Any]]) -> Any:
    """``cls`` that is converted as soon as it is built, before its weights are loaded."""
    from .api import convert

    def init(self: Any, config: Any, *args: Any, **options: Any) -> None:
        cls.__init__(self, config, *args, **options)
        for conversion in conversions:
            convert(self, target=partial(_is_among, conversion["modules"]), **conversion["arguments"])
        self.__class__ = loading

    loading = type(cls.__name__, (cls,), {"__init__": init, "__module__": cls.__module__})
    return loading
