"""Layers that DSC is compared with: a dense feed-forward layer, Standard MoE, Mixture-of-LoRAs and PEER."""

from torchdsc.nn import DenseFFN

from .mixture_of_loras import MixtureOfLoRAs
from .moe import StandardMoE
from .peer import PEER
from .router import SoftmaxRouter

__all__ = ["PEER", "DenseFFN", "MixtureOfLoRAs", "SoftmaxRouter", "StandardMoE"]
