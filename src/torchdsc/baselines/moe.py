"""Standard Mixture-of-Experts, on transformers' expert kernels."""

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from torchdsc.arguments import check_at_least, check_types
from torchdsc.nn import DenseFFN, GatedFFN, RegularizerWeights, RoutedLayer, Routing, RoutingStatistics
from torchdsc.nn.options import RouterNorm
from torchdsc.ops.export import is_exporting

from .router import Balancing, SoftmaxRouter

ExpertKernel = Literal["auto", "eager", "batched_mm", "grouped_mm"]

# Up to so many pairs of token and expert, a GPU gathers whole experts instead of sorting tokens. On a CPU, the loop
# over experts was measured to be as fast as the grouped product for 4,096 tokens, and four times as fast for one.
_FEW_PAIRS = 4


class StandardMoE(RoutedLayer):
    """``y = sum_{e in top-k} p_e gelu(x W_1e) W_2e``, with experts without biases, and optional shared experts.

    Gated experts are ``(silu(x W_ge) * (x W_ue)) W_2e``. The regularisers are the load balance N sum_j P_j f_j (k when
    uniform) and the router z-loss; :func:`torchdsc.regularization` collects them, as those of DSC.

    With ``balancing="bias"`` (arXiv 2408.15664) load is balanced without a loss: experts are selected by p + b, and
    weighted by p alone. After each optimizer step, ``b += bias_rate sign(mean load - load)``, with the load of all
    training passes with gradients since the step before. So b is the same throughout a step: in all its micro-batches,
    and where activation checkpointing recomputes a pass. DSCGPT counts a recomputed pass once; a layer elsewhere counts
    it twice, which changes no sign if all are recomputed. An optimizer of :func:`torchdsc.build_optimizer` moves b; in
    a loop with another, call :meth:`after_step`. The load is that of its own process. b is saved with the weights.

    Args:
        in_features: d.
        hidden_features: Width h of an expert.
        num_experts: N.
        top_k: Experts per token.
        normalize_weights: Divide the selected softmax weights by their sum; by default if ``top_k > 1``. A single
            weight would always be 1 and give the router no gradient from the task: training with ``top_k=1`` and True
            raises, evaluation works. The published run does not normalise.
        jitter: Standard deviation of noise on the router's logits in training.
        router_norm: LayerNorm before the router.
        aux_weight: Weight of the load balance; by default 0.01, or 0 with ``balancing="bias"``.
        z_weight: Weight of the z-loss.
        shared_experts: Number of additional experts that every token uses, unweighted.
        gated: Whether experts, shared ones too, are gated: three matrices each instead of two.
        balancing: "loss" for the load balance alone, "bias" for a bias for selection; a given ``aux_weight`` acts
            beside it.
        bias_rate: How far a step moves b.
        impl: Expert kernel: "grouped_mm" and "batched_mm" are those of transformers, "eager" is a loop over experts;
            "auto" takes the fastest for the number of tokens and the device.
        device: Where the parameters live.
        dtype: Their dtype.

    Raises:
        TypeError: If an argument has another type.
        ValueError: On an argument out of its range; in a forward pass in float64 with "grouped_mm", which has no such
            kernel.
    """

    router: SoftmaxRouter

    def __init__(
        self,
        in_features: int,
        hidden_features: int,
        num_experts: int,
        top_k: int = 2,
        *,
        normalize_weights: bool | None = None,
        jitter: float = 0.0,
        router_norm: RouterNorm = "none",
        aux_weight: float | None = None,
        z_weight: float = 1e-4,
        shared_experts: int = 0,
        gated: bool = False,
        balancing: Balancing = "loss",
        bias_rate: float = 0.001,
        impl: ExpertKernel = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_types(StandardMoE.__init__, locals())
        check_at_least(1, in_features=in_features, hidden_features=hidden_features)
        check_at_least(0, shared_experts=shared_experts)
        self.in_features = self.out_features = in_features
        self.num_experts, self.impl = num_experts, impl
        if aux_weight is None:
            aux_weight = 0.01 if balancing == "loss" else 0.0
        self.regularizers = RegularizerWeights(aux=aux_weight, z=z_weight)
        self.router = SoftmaxRouter(
            in_features,
            num_experts,
            top_k,
            normalize_weights=normalize_weights,
            jitter=jitter,
            norm=router_norm,
            balancing=balancing,
            bias_rate=bias_rate,
            device=device,
            dtype=dtype,
        )
        self.experts = Experts(num_experts, in_features, hidden_features, gated=gated, device=device, dtype=dtype)
        # Together they are one layer.
        shared, kind = shared_experts * hidden_features, GatedFFN if gated else DenseFFN
        self.shared = kind(in_features, shared, device=device, dtype=dtype) if shared else None

    def leave_statistics(self, statistics: RoutingStatistics | None, output: Tensor) -> None:
        """See :class:`torchdsc.nn.RoutedLayer`; the load counts for :meth:`after_step` too."""
        load = None if statistics is None else statistics.load
        if self.router.balancing == "bias" and self.training and torch.is_grad_enabled() and load is not None:
            self.router.count(load)
        super().leave_statistics(statistics, output)

    def after_step(self) -> None:
        """Move the bias for selection by the load since the last call."""
        if self.router.balancing == "bias":
            self.router.balance()

    def _route(self, routed: Tensor, token_mask: Tensor | None) -> Routing:
        collect = self.training and (self.regularizers.need_tokens or self.router.balancing == "bias")
        found: Routing = self.router(routed, token_mask, collect)
        return found

    def _compose(self, flat: Tensor, routing: Routing) -> Tensor:
        # The experts check the dtype themselves.
        indices, weights = routing.indices, routing.coefficients
        y: Tensor = self.experts(flat, indices, weights, self._kernel(flat, indices))
        return y if self.shared is None else y + self.shared(flat)

    def _kernel(self, x: Tensor, indices: Tensor) -> str:
        # Compiled, transformers uses another grouped product, which takes every dtype.
        grouped = x.dtype != torch.float64 or torch.compiler.is_compiling()
        if self.impl != "auto":
            if self.impl == "grouped_mm" and not grouped:
                raise ValueError("impl='grouped_mm' has no float64 kernel, use 'eager' or 'batched_mm'")
            return self.impl
        if is_exporting():
            return "batched_mm"
        if torch.compiler.is_compiling():
            return "grouped_mm"
        if x.device.type == "cpu" or not grouped:
            return "eager"
        return "batched_mm" if indices.numel() <= _FEW_PAIRS else "grouped_mm"


class _KernelInterface:
    """The attributes that transformers' expert kernels read."""

    has_gate: bool
    has_bias = False
    has_post_expert_norm = False
    is_transposed = False
    _is_expert_parallel = False

    def act_fn(self, x: Tensor) -> Tensor:
        return functional.silu(x) if self.has_gate else functional.gelu(x)

    def _apply_gate(self, x: Tensor) -> Tensor:
        gate, up = x.chunk(2, dim=-1)
        return self.act_fn(gate) * up


class _PaddedExperts(_KernelInterface):
    def __init__(self, num_experts: int, first: Tensor, down_proj: Tensor, has_gate: bool) -> None:
        self.num_experts, self.down_proj, self.has_gate = num_experts, down_proj, has_gate
        self.up_proj = self.gate_up_proj = first


class Experts(_KernelInterface, nn.Module):
    """Weights of N experts, laid out for transformers' kernels: ``up_proj`` (N, h, d) and ``down_proj`` (N, d, h).

    Gated experts have ``gate_up_proj`` (N, 2 h, d), W_g before W_u, in place of ``up_proj``.
    """

    up_proj: nn.Parameter
    gate_up_proj: nn.Parameter

    def __init__(
        self, num_experts: int, in_features: int, hidden_features: int, *, gated: bool = False, **factory: Any
    ) -> None:
        super().__init__()
        self.num_experts, self.has_gate = num_experts, gated
        rows, name = (2 * hidden_features, "gate_up_proj") if gated else (hidden_features, "up_proj")
        self.register_parameter(name, nn.Parameter(torch.empty(num_experts, rows, in_features, **factory)))
        self.down_proj = nn.Parameter(torch.empty(num_experts, in_features, hidden_features, **factory))
        self.reset_parameters()

    @property
    def first(self) -> Tensor:
        """The weight that experts apply to tokens."""
        return self.gate_up_proj if self.has_gate else self.up_proj

    def reset_parameters(self) -> None:
        """Uniform within +-1 / sqrt(fan in), as ``nn.Linear``."""
        for weight in (self.first, self.down_proj):
            nn.init.uniform_(weight, -(weight.shape[-1] ** -0.5), weight.shape[-1] ** -0.5)

    def forward(self, x: Tensor, indices: Tensor, weights: Tensor, kernel: str) -> Tensor:
        """Map tokens (T, d), given their experts (T, k) and weights (T, k), to outputs (T, d).

        Raises:
            TypeError: If the dtype of ``x`` is not that of the parameters, and autocast is off.
        """
        dtype = self.down_proj.dtype
        if x.dtype != dtype:
            if not torch.is_autocast_enabled(x.device.type) or not x.is_floating_point():
                raise TypeError(f"x must have the dtype of the parameters, {dtype}, got {x.dtype}")
            x = x.to(dtype)
        weights = weights.to(dtype)
        if x.shape[0] == 0 or kernel == "eager":
            return self._eager(x, indices, weights)
        run = _transformers_kernel(kernel)
        y: Tensor = (
            self._aligned(run, x, indices, weights) if kernel == "grouped_mm" else run(self, x, indices, weights)
        )
        return y

    def _aligned(self, run: Callable[..., Tensor], x: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
        """Pad with zeros: the grouped product needs rows of multiples of 16 bytes, which a width such as 545 is not."""
        down_proj: Tensor = self.down_proj
        _, features, hidden = down_proj.shape
        unit = 16 // down_proj.element_size()
        more_hidden, more = -hidden % unit, -features % unit
        if not (more_hidden or more):
            return run(self, x, indices, weights)
        # Gate and up are padded each.
        halves = self.first.reshape(self.num_experts, -1, hidden, features)
        first = functional.pad(halves, (0, more, 0, more_hidden)).flatten(1, 2)
        down_proj = functional.pad(down_proj, (0, more_hidden, 0, more))
        padded = _PaddedExperts(self.num_experts, first, down_proj, self.has_gate)
        return run(padded, functional.pad(x, (0, more)), indices, weights)[:, :features]

    def _eager(self, x: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
        y = torch.zeros_like(x)
        first, activate = self.first, self._apply_gate if self.has_gate else self.act_fn
        for expert in range(self.num_experts):
            tokens, slot = torch.where(indices == expert)
            hidden = activate(functional.linear(x[tokens], first[expert]))
            output = functional.linear(hidden, self.down_proj[expert]) * weights[tokens, slot].unsqueeze(1)
            y = y.index_add(0, tokens, output.to(y.dtype))
        return y


def _transformers_kernel(name: str) -> Callable[..., Tensor]:
    try:
        from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
    except ImportError as error:
        raise ImportError(f"impl={name!r} needs transformers >= 5.17: pip install 'torchdsc[models]'") from error
    kernel: Callable[..., Tensor] = ALL_EXPERTS_FUNCTIONS[name]
    return kernel
