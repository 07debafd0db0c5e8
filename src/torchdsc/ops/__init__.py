"""Functions without parameters: selection of atoms, gate, composition, frame potential, short convolution."""

from .compose import compose
from .frame import frame_potential
from .gate import gate
from .latents import latents
from .native import build_name
from .ngrams import ngram_codes, ngram_rows
from .product_key import select_product_key
from .route import route
from .select import Selection, select
from .short_convolution import short_convolution

# Registers formulas of the operators, which are there now.
from . import flops as _flops  # noqa: F401  # isort: skip

__all__ = [
    "Selection",
    "build_name",
    "compose",
    "frame_potential",
    "gate",
    "latents",
    "ngram_codes",
    "ngram_rows",
    "route",
    "select",
    "select_product_key",
    "short_convolution",
]
