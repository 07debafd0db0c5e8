"""The mathematics as functions: scoring and selecting atoms, gating, composing, mixing. Imports torch only."""

from .compose import compose
from .frame import frame_potential
from .gate import gate
from .latents import latents
from .mix import causal_mix
from .product_key import select_product_key
from .route import route
from .select import Selection, select

__all__ = [
    "Selection",
    "causal_mix",
    "compose",
    "frame_potential",
    "gate",
    "latents",
    "route",
    "select",
    "select_product_key",
]
