"""Layers that DSC is compared with: dense and gated ones, Standard MoE, Mixture-of-LoRAs, PEER, and n-gram tables."""

from torchdsc.nn import DenseFFN, GatedFFN

from .mixture_of_loras import MixtureOfLoRAs
from .moe import StandardMoE
from .ngram_tables import NgramTables
from .peer import PEER
from .router import SoftmaxRouter

__all__ = ["PEER", "DenseFFN", "GatedFFN", "MixtureOfLoRAs", "NgramTables", "SoftmaxRouter", "StandardMoE"]
