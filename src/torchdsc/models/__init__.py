"""DSCGPT: the paper's transformer as a Hugging Face model; importing this module registers it with the Auto classes."""

try:
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
except ImportError as error:
    raise ImportError("torchdsc.models needs transformers >= 5.17: pip install 'torchdsc[models]'") from error

from .configuration import DSCGPTConfig
from .conversion import register_conversion
from .modeling import DSCGPTForCausalLM, DSCGPTModel, DSCGPTPreTrainedModel

AutoConfig.register(DSCGPTConfig.model_type, DSCGPTConfig, exist_ok=True)
AutoModel.register(DSCGPTConfig, DSCGPTModel, exist_ok=True)
AutoModelForCausalLM.register(DSCGPTConfig, DSCGPTForCausalLM, exist_ok=True)
register_conversion()

__all__ = ["DSCGPTConfig", "DSCGPTForCausalLM", "DSCGPTModel", "DSCGPTPreTrainedModel"]
