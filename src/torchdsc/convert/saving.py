"""Saving of converted Hugging Face models."""

import json
from pathlib import Path
from typing import Any, cast

from torch import nn

from torchdsc.losses.host import is_pretrained

# In config.json: what was converted.
CONVERSIONS = "torchdsc_conversions"
# In config.json: where transformers looks for weights. No such file exists, so that a loader stops that would leave out
# what was put into the model, and start its feed-forward modules anew.
REDIRECTION = "transformers_weights"
_NO_FILE = "to-be-loaded-by-torchdsc.load_converted.safetensors"


def remember_conversion(model: nn.Module, conversion: dict[str, Any]) -> None:
    """Let ``save_pretrained`` of a Hugging Face model write down a conversion for :func:`torchdsc.load_converted`.

    Args:
        model: The converted model; others than Hugging Face's are left as they are.
        conversion: Arguments of :func:`torchdsc.convert`.
    """
    if not is_pretrained(model):
        return
    if not isinstance(model, _Converted):
        model.__class__ = converted_class(type(model))
    config: Any = model.config
    setattr(config, CONVERSIONS, [*getattr(config, CONVERSIONS, []), conversion])


class _Converted:
    """Put before the class of a model, it saves what was converted beside the weights."""

    def save_pretrained(self, save_directory: str | Path, *args: Any, **options: Any) -> None:
        """See transformers; config.json then says what :func:`torchdsc.load_converted` has to convert."""
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
        # The class is made here, not found in a module: a pickle names the one it was made of.
        _, _, *state = cast(tuple[Any, ...], super().__reduce_ex__(2))
        return (_blank, (type(self).__mro__[2],), *state)


def _blank(cls: type[nn.Module]) -> Any:
    made = converted_class(cls)
    return made.__new__(made)


_converted_classes: dict[type, Any] = {}


def converted_class(cls: type) -> Any:
    """``cls`` with another ``save_pretrained``, under the same name: transformers goes by names."""
    if cls not in _converted_classes:
        attributes = {"__module__": cls.__module__, "__doc__": cls.__doc__}
        _converted_classes[cls] = type(cls.__name__, (_Converted, cls), attributes)
    return _converted_classes[cls]
