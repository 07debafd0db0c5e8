"""Loading of older DSCGPT checkpoints, in which a single gamma has shape ()."""

from typing import Any

from torch import Tensor
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import ConversionOps, WeightConverter

from .configuration import DSCGPTConfig


class _AtLeast1d(ConversionOps):
    """Reshape () to (1,), and leave other shapes; saving changes nothing."""

    def convert(
        self, input_dict: dict[str, Any], source_patterns: list[str], target_patterns: list[str], **kwargs: Any
    ) -> dict[str, Tensor]:
        (found,) = input_dict.values()
        gamma: Tensor = found[0] if isinstance(found, list) else found
        return {target_patterns[0]: gamma.reshape(1) if gamma.dim() == 0 else gamma}

    @property
    def reverse_op(self) -> ConversionOps:
        return _AtLeast1d()


def register_conversion() -> None:
    """Make ``from_pretrained`` load older checkpoints; ``load_state_dict`` already does."""
    converter = WeightConverter("gamma", "gamma", [_AtLeast1d()])
    register_checkpoint_conversion_mapping(DSCGPTConfig.model_type, [converter], overwrite=True)
