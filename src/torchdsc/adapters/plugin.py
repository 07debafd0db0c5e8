"""Registration with PEFT, which does not provide for methods of other packages."""

from peft import PeftConfig, PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import register_peft_method

from .files import watch_loading


def peft_type(name: str) -> PeftType:
    """The member ``name`` of PEFT's enum of methods, added if it is missing.

    ``register_peft_method`` refuses other names, and plain strings as keys of PEFT's mappings fail in ``load_adapter``.
    """
    if name not in PeftType._member_map_:
        member = str.__new__(PeftType, name)
        member._name_, member._value_ = name, name
        # From Python 3.12 on PeftType.NAME is an attribute of the class, which takes none that is a member already.
        setattr(PeftType, name, member)
        PeftType._member_names_.append(name)
        PeftType._member_map_[name] = member
        PeftType._value2member_map_[name] = member
    return PeftType[name]


def register(name: str, config: type[PeftConfig], model: type[BaseTuner]) -> None:
    """Register a method with PEFT, unless it already is, and have its files checked when they are loaded."""
    watch_loading(name, model.tuner_layer_cls.container)
    if peft_type(name) not in PEFT_TYPE_TO_CONFIG_MAPPING:
        register_peft_method(name=name.lower(), config_cls=config, model_cls=model, prefix=model.prefix)
