"""Adapters for pretrained Hugging Face models; importing this module registers them with PEFT."""

try:
    import peft
except ImportError as error:
    raise ImportError("torchdsc.adapters needs peft >= 0.21: pip install 'torchdsc[adapters]'") from error

if not hasattr(peft.tuners.tuners_utils.BaseTuner, "_remap_adapter_state_dict_for_load"):
    raise ImportError(f"torchdsc.adapters needs peft >= 0.21, found {peft.__version__}: pip install -U peft")

from torchdsc.losses import RegularizedLoss, last_regularization

from .atoms import add_atoms, atoms_used_by, freeze_atoms, remove_atoms
from .config import DSCAdapterConfig, MixtureOfLoRAsConfig
from .dsc_layer import DSCAdapterLayer
from .layer import AdapterLayer, MixtureOfLoRAsLayer
from .model import DSCAdapterModel, MixtureOfLoRAsModel
from .plugin import register
from .strength import scale_adapter, signal_strength

register(DSCAdapterConfig.METHOD, DSCAdapterConfig, DSCAdapterModel)
register(MixtureOfLoRAsConfig.METHOD, MixtureOfLoRAsConfig, MixtureOfLoRAsModel)

__all__ = [
    "AdapterLayer",
    "DSCAdapterConfig",
    "DSCAdapterLayer",
    "DSCAdapterModel",
    "MixtureOfLoRAsConfig",
    "MixtureOfLoRAsLayer",
    "MixtureOfLoRAsModel",
    "RegularizedLoss",
    "add_atoms",
    "atoms_used_by",
    "freeze_atoms",
    "last_regularization",
    "remove_atoms",
    "scale_adapter",
    "signal_strength",
]
