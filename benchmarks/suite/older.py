"""Layers by their present names, also where the library is an older one, the base of a comparison, with other names."""

from typing import Any

from torch import Tensor, nn

import torchdsc
from torchdsc import DSC
from torchdsc.baselines import DenseFFN


def _either(name: str, before: str) -> Any:
    return getattr(torchdsc, name) if hasattr(torchdsc, name) else getattr(torchdsc, before)


Residual = _either("Residual", "DSCResidual")
ShortConvolution = _either("ShortConvolution", "CausalContext")


class HandWired(nn.Module):
    """The recommended :class:`torchdsc.DSCFeedForward`, of the parts that older libraries have too.

    Args:
        features: d.
        hidden_features: Width of the static layer.
        num_atoms: M.
        top_k: K.
        normalize_embeddings: False.
    """

    def __init__(
        self, features: int, hidden_features: int, *, num_atoms: int, top_k: int, normalize_embeddings: bool
    ) -> None:
        super().__init__()
        assert not normalize_embeddings
        self.router_context = ShortConvolution(features, 3)
        self.input_context = ShortConvolution(features, 4, own=0.0, earlier=0.25)
        dsc = DSC(features, num_atoms=num_atoms, top_k=top_k, gamma_init=1.0, frame_weight=0.0)
        self.layer = Residual(DenseFFN(features, hidden_features), dsc)

    def forward(self, x: Tensor, embeddings: Tensor) -> Tensor:
        y: Tensor = self.layer(self.input_context(embeddings, onto=x), router_input=self.router_context(embeddings))
        return y


DSCFeedForward = getattr(torchdsc, "DSCFeedForward", HandWired)
