"""What DSC is measured against: a dense feed-forward layer, Standard MoE and Mixture-of-LoRAs."""

from .dense import DenseFFN
from .mixture_of_loras import MixtureOfLoRAs
from .moe import StandardMoE
from .router import SoftmaxRouter

__all__ = ["DenseFFN", "MixtureOfLoRAs", "SoftmaxRouter", "StandardMoE"]
