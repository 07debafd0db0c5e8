"""Mixture-of-LoRAs: DSC without unit norms and magnitude gate, and with atoms grouped into experts of rank r."""

import math

import torch
from torch import Tensor, nn

from torchdsc.arguments import check_at_least, check_positive, check_types
from torchdsc.nn import RegularizerWeights, RoutedLayer, Routing
from torchdsc.nn.options import RouterNorm
from torchdsc.ops import compose
from torchdsc.ops.compose.api import Implementation

from .router import SoftmaxRouter


class MixtureOfLoRAs(RoutedLayer):
    """``y = scale sum_{e in top-k} p_e (x A_e^T) B_e`` with A_e, B_e of rank r; to be added to a static layer.

    At r = 1 it is DSC without unit norms and magnitude gate. Both use the same :func:`torchdsc.ops.compose`.

    Args:
        in_features: d_in.
        out_features: d_out; ``in_features`` by default.
        num_experts: N.
        rank: r >= 1.
        top_k: Experts per token.
        scale: Constant factor, LoRA's alpha / r.
        normalize_weights: Divide the selected softmax weights by their sum; by default if ``top_k > 1``. A single
            weight would always be 1 and give the router no gradient from the task: training with ``top_k=1`` and True
            raises, evaluation works.
        router_norm: LayerNorm before the router.
        aux_weight: Weight of the load balance N sum_j P_j f_j.
        z_weight: Weight of the router z-loss.
        impl: Implementation of the composition.
        device: Where the parameters live.
        dtype: Their dtype.

    Attributes:
        down: A, of shape (N r, d_in), Kaiming uniform at the start.
        up: B, of shape (N r, d_out), zero at the start as in LoRA.

    Raises:
        TypeError: If an argument has another type.
        ValueError: On an argument out of its range.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int | None = None,
        *,
        num_experts: int,
        rank: int,
        top_k: int = 2,
        scale: float = 1.0,
        normalize_weights: bool | None = None,
        router_norm: RouterNorm = "none",
        aux_weight: float = 0.01,
        z_weight: float = 1e-4,
        impl: Implementation = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_types(MixtureOfLoRAs.__init__, locals())
        out_features = in_features if out_features is None else out_features
        check_at_least(1, in_features=in_features, out_features=out_features, rank=rank)
        check_positive(scale=scale)
        self.in_features, self.out_features = in_features, out_features
        self.num_experts, self.rank, self.scale, self.impl = num_experts, rank, scale, impl
        self.regularizers = RegularizerWeights(aux=aux_weight, z=z_weight)
        self.router = SoftmaxRouter(
            in_features,
            num_experts,
            top_k,
            normalize_weights=normalize_weights,
            norm=router_norm,
            device=device,
            dtype=dtype,
        )
        self.down = nn.Parameter(torch.empty(num_experts * rank, in_features, device=device, dtype=dtype))
        self.up = nn.Parameter(torch.empty(num_experts * rank, self.out_features, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Kaiming uniform ``down``, zero ``up``."""
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))
        nn.init.zeros_(self.up)

    @property
    def parameter_dtype(self) -> torch.dtype:
        """See :class:`torchdsc.nn.RoutedLayer`."""
        return self.down.dtype

    def _route(self, routed: Tensor, token_mask: Tensor | None) -> Routing:
        found: Routing = self.router(routed, token_mask, self.training and self.regularizers.need_tokens)
        return found

    def _compose(self, flat: Tensor, routing: Routing) -> Tensor:
        # Expert e is the atoms e r ... e r + r - 1.
        offsets = torch.arange(self.rank, device=flat.device)
        indices = (routing.indices.unsqueeze(-1) * self.rank + offsets).flatten(1)
        coefficients = (routing.coefficients * self.scale).repeat_interleave(self.rank, dim=1)
        return compose(flat, self.down, self.up, indices, coefficients, eps=None, impl=self.impl)
