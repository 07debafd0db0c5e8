"""Saving of converted Hugging Face models."""

import copy
import json
from pathlib import Path
from typing import Any, cast

from torch import nn

from torchdsc.losses.host import is_pretrained

# Key of config.json that lists the conversions.
CONVERSIONS = "torchdsc_conversions"
# Key of config.json for the file with the weights. It names one that does not exist, so that ``from_pretrained`` fails
# instead of ignoring the DSC layers and initialising the original modules anew.
REDIRECTION = "transformers_weights"
_NO_FILE = "to-be-loaded-by-torchdsc.load_converted.safetensors"


def remember_conversion(model: nn.Module, conversion: dict[str, Any]) -> None:
    """Make ``save_pretrained`` of a Hugging Face model record a conversion for :func:`torchdsc.load_converted`.

    Args:
        model: The converted model; nothing happens if it is not a Hugging Face model.
        conversion: Arguments of :func:`torchdsc.convert`.
    """
    if not is_pretrained(model):
        return
    config: Any = model.config
    if not isinstance(model, _Converted):
        model.__class__ = converted_class(type(model))
        # Other models may have been made from the same config.
        shared, config = config, copy.copy(config)
        setattr(config, CONVERSIONS, [])
        for module in model.modules():
            if module.__dict__.get("config") is shared:
                module.config = config
    setattr(config, CONVERSIONS, [*getattr(config, CONVERSIONS), conversion])


class _Converted:
    """Mixin for the class of a converted model, which saves its conversions in config.json."""

    def save_pretrained(self, save_directory: str | Path, *args: Any, **options: Any) -> None:
        """See transformers; config.json also records the conversions for :func:`torchdsc.load_converted`."""
        if options.get("push_to_hub"):
            raise ValueError(
                "push_to_hub must be False for a converted model, got True: save it, and upload the folder"
            )
        super().save_pretrained(save_directory, *args, **options)  # type: ignore[misc]
        path = Path(save_directory, "config.json")
        if path.is_file():
            settings = json.loads(path.read_text(encoding="utf-8"))
            settings[REDIRECTION] = _NO_FILE
            path.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # This class is made at run time, so a pickle refers to the original class instead.
        _, _, *state = cast(tuple[Any, ...], super().__reduce_ex__(2))
        return (_blank, (type(self).__mro__[2],), *state)


def _blank(cls: type[nn.Module]) -> Any:
    made = converted_class(cls)
    return made.__new__(made)


_converted_classes: dict[type, Any] = {}


def converted_class(cls: type) -> Any:
    """``cls`` with :class:`_Converted` mixed in, under the same name, by which transformers identifies classes."""
    if cls not in _converted_classes:
        attributes = {"__module__": cls.__module__, "__doc__": cls.__doc__}
        _converted_classes[cls] = type(cls.__name__, (_Converted, cls), attributes)
    return _converted_classes[cls]
