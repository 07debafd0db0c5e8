"""The DSC layer: ``x -> x dW(z(x))``."""

import math
from dataclasses import replace
from typing import Any, Self, Unpack

import torch
from torch import Tensor, nn
from torch.nn import functional

from torchdsc.arguments import check_at_least, check_types
from torchdsc.ops import Selection, gate

from .bank import BasisBank
from .options import DSCArguments, DSCOptions
from .routers import NgramRouter, Router, build_router
from .routing import Routing
from .rows_on_disk import ask_for_rows
from .sharding import check_not_flattened, whole
from .statistics import RoutedLayer, sum_statistics


class Projection(nn.Linear):
    """A linear map whose rows, or columns if these are fewer, are orthonormal at the start."""

    def reset_parameters(self) -> None:
        """Draw the weight again."""
        nn.init.orthogonal_(self.weight)


class DSC(RoutedLayer):
    """Dynamic Subspace Composition: ``y = scale gamma * ((x U_I^T) * z) V_I``, equations (4), (5) and (14).

    It returns only the update x dW(z(x)); :class:`torchdsc.Residual` adds it to a base layer. The default is the
    paper's Algorithm 2, ``DSC.basic(...)`` its Algorithm 1. With ``activation="relu"`` the latent values x . u_k are
    rectified: ``y = scale gamma * (relu(x U_I^T) * z) V_I``. ``|dW|_2 < scale max |gamma|`` holds for every token,
    equations (7) and (8). With ``atom_features=r`` atoms are thin, and
    ``y = scale gamma * Q (((P x U_I^T) * z) V_I)``, with P and Q shared by all. The bound is then multiplied by
    ``|P|_2 |Q|_2``, which is 1 at the start. With ``offset=True`` the layer is ``x dW + o``, with an offset o
    composed from the same atoms, and ``|x dW + o| < scale max |gamma| sqrt(|x|^2 + d)``. With ``max_update_norm=m``,
    ``s / (1 + |s| / m)`` takes the place of s = scale gamma everywhere, so that ``|dW|_2 <= m`` whatever is trained.

    Args:
        in_features: d_in.
        out_features: d_out; ``in_features`` by default.
        options: The layer's options, see :class:`DSCOptions`.
        bank: A bank to share with another layer, which then is a submodule of both, like tied weights; by default a
            new one.
        device: Where new parameters live.
        dtype: Their dtype.
        **changes: Fields of :class:`DSCOptions`, which override those of ``options``. Without ``options``,
            ``num_atoms`` and ``top_k`` are required.

    Attributes:
        bank: The atoms, a :class:`BasisBank`; raw rows ``bank.u`` (M, d_in) and ``bank.v`` (M, d_out).
        router: Selects atoms for each token; ``router.weight`` of the linear router has shape (M, d_in).
        reduce: P, of shape (r, d_in), orthonormal at the start; None if atoms are not thin.
        expand: Q, of shape (d_out, r), likewise.
        gamma: Learned output scale of shape (d_out,), or (1,) for Algorithm 1. Older checkpoints, where its shape is
            (), load too.

    Raises:
        TypeError: If an argument has another type, or an option is unknown or missing.
        ValueError: On an option out of its range, or a ``bank`` of another size.
    """

    bank: BasisBank
    router: Router

    def __init__(
        self,
        in_features: int,
        out_features: int | None = None,
        options: DSCOptions | None = None,
        *,
        bank: BasisBank | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **changes: Unpack[DSCArguments],
    ) -> None:
        super().__init__()
        check_types(DSC.__init__, locals())
        check_at_least(1, in_features=in_features, out_features=out_features)
        self.options = DSCOptions(**changes) if options is None else replace(options, **changes)
        self.regularizers = self.options.regularizers
        self.in_features = in_features
        self.out_features = in_features if out_features is None else out_features
        num_atoms, thin = self.options.num_atoms, self.options.atom_features
        features = (self.in_features, self.out_features) if thin is None else (thin, thin)
        features = (features[0] + self.options.offset, features[1])
        if bank is None:
            norm = self.options.atom_init_norm
            bank = BasisBank(
                num_atoms,
                *features,
                init_norm=norm,
                sparse_gradients=self.options.sparse_gradients,
                device=device,
                dtype=dtype,
            )
        sizes = (bank.num_atoms, bank.in_features, bank.out_features)
        if sizes != (num_atoms, *features):
            raise ValueError(
                f"bank must have (num_atoms, in_features, out_features) = {(num_atoms, *features)}, got {sizes}"
            )
        if bank.sparse_gradients != self.options.sparse_gradients:
            raise ValueError(
                f"bank must have sparse_gradients = {self.options.sparse_gradients}, got {bank.sparse_gradients}"
            )
        self.bank = bank
        self.reduce = self.expand = None
        if thin is not None:
            self.reduce = Projection(in_features, thin, bias=False, device=device, dtype=dtype)
            self.expand = Projection(thin, self.out_features, bias=False, device=device, dtype=dtype)
        self.router = build_router(in_features, self.options, device, dtype)
        # FSDP does not shard scalars, so the shape is (1,) rather than ().
        shape = (self.out_features if self.options.channelwise_gamma else 1,)
        self.gamma = nn.Parameter(torch.full(shape, self.options.gamma_init, device=device, dtype=dtype))

    @classmethod
    def basic(
        cls,
        in_features: int,
        out_features: int | None = None,
        *,
        bank: BasisBank | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **changes: Unpack[DSCArguments],
    ) -> Self:
        """Algorithm 1: the router sees x itself, and gamma is a scalar; arguments are those of the class."""
        options: DSCArguments = {"router_norm": "none", "channelwise_gamma": False, **changes}
        return cls(in_features, out_features, bank=bank, device=device, dtype=dtype, **options)

    @property
    def output_scale(self) -> Tensor:
        """``scale gamma``, of the shape of gamma; ``s / (1 + |s| / m)`` of that s for ``max_update_norm=m``."""
        gamma = whole(self.gamma)
        scaled = gamma if self.options.scale == 1.0 else gamma * self.options.scale
        most = self.options.max_update_norm
        # Not tanh, whose gradient is soon exactly zero: Adam moves gamma by its rate whatever that does to the output.
        return scaled if most is None else scaled / (1 + scaled.abs() / most)

    @torch.no_grad()
    def multiply_output_scale(self, factor: float) -> None:
        """Multiply ``output_scale``, and so the output, by a factor in [0, 1], through gamma, sharded or whole."""
        if not 0 <= factor <= 1:
            raise ValueError(f"factor must be in [0, 1], got {factor}")
        most = self.options.max_update_norm
        if most is None:
            self.gamma.mul_(factor)
        else:
            # What becomes of the bounded scale, taken back through the bound.
            ratio = self.gamma.abs() * (self.options.scale / most)
            self.gamma.mul_(factor / (1 + ratio * (1 - factor)))

    def regularizer_factor(self) -> Tensor | None:
        """See :class:`RoutedLayer`: 0 while gamma is still at its initial zero.

        Bank and router get no gradient from the task then, and Adam, which divides by the gradient's size, would
        follow the regularisers at its full learning rate.
        """
        if self.options.gamma_init != 0:
            return None
        gamma = whole(self.gamma.detach())
        check_not_flattened("gamma", gamma, (self.out_features if self.options.channelwise_gamma else 1,))
        return (gamma != 0).any()

    def reset_parameters(self) -> None:
        """Initialise the bank (shared or not), the router and gamma again."""
        self.bank.reset_parameters()
        self.router.reset_parameters()
        for projection in (self.reduce, self.expand):
            if projection is not None:
                projection.reset_parameters()
        nn.init.constant_(self.gamma, self.options.gamma_init)

    @property
    def parameter_dtype(self) -> torch.dtype:
        """See :class:`RoutedLayer`."""
        return self.gamma.dtype

    def _route(self, routed: Tensor, token_mask: Tensor | None) -> Routing:
        options = self.options
        if isinstance(self.router, NgramRouter) and routed.dtype != torch.int64:
            raise TypeError(
                "router_input must be codes of torchdsc.ops.ngram_codes (torch.int64) for router = 'ngram', got "
                f"{routed.dtype}"
            )
        collect = self.training and self.regularizers.need_tokens
        found: Selection = self.router(
            routed,
            options.top_k,
            logit_clamp=options.logit_clamp,
            token_mask=token_mask,
            statistics=collect and self.regularizers.need_logits,
            raw_normalizer=options.z_loss_on_raw_logits and self.regularizers.z > 0,
        )
        # PEFT may have wrapped the bank.
        if getattr(self.bank, "asks_ahead", False) and not torch.compiler.is_compiling():
            ask_for_rows(self.bank, found.indices)
        logits = found.logits
        if self.parameter_dtype == torch.float64:
            # Codes of n-grams do not tell.
            logits = logits.double()
        coefficients, strength = gate(logits, logit_clamp=options.logit_clamp, eps=options.eps, kind=options.gate)
        statistics = None
        if collect:
            statistics = sum_statistics(strength, found.log_normalizer, found.probability_sum, token_mask)
        return Routing(found.indices, coefficients, strength, found.logits, statistics)

    def _flatten_router_input(self, router_input: Tensor, dtype: torch.dtype | None, x: Tensor | None = None) -> Tensor:
        if not isinstance(self.router, NgramRouter):
            return super()._flatten_router_input(router_input, dtype, x)
        if x is not None and router_input.shape[:-1] != x.shape[:-1]:
            raise ValueError(
                f"router_input must be codes of shape {(*x.shape[:-1], 'n')}, got {tuple(router_input.shape)}"
            )
        return router_input.reshape(-1, router_input.shape[-1])

    def _compose(self, flat: Tensor, routing: Routing) -> Tensor:
        constant = self.options.gate == "none" and self.options.top_k == 1 and not isinstance(self.router, NgramRouter)
        if constant and self.training and torch.is_grad_enabled():
            raise ValueError(
                "gate must be 'sum' or 'mean' to train with top_k = 1, got 'none': the coefficient would always be 1, "
                "and the router get no gradient from the task"
            )
        if self.reduce is not None:
            # Autocast may have made it another dtype than the bank's.
            flat = self.reduce(flat).to(flat.dtype)
        flat = self._with_constant(flat)
        coefficients = self._rectified(flat, routing)
        composed: Tensor = self.bank(flat, routing.indices, coefficients, eps=self.options.eps, impl=self.options.impl)
        if self.expand is not None:
            composed = self.expand(composed)
        scale = self.output_scale
        # In place in inference: compose returned a new tensor.
        inference = not torch.is_grad_enabled() and not torch.compiler.is_compiling()
        scaled: Tensor = composed.mul_(scale) if inference and composed.dtype == scale.dtype else composed * scale
        return scaled

    def _with_constant(self, flat: Tensor) -> Tensor:
        """Tokens (T, d) with sqrt(d) after their features if atoms have an offset."""
        if not self.options.offset:
            return flat
        return functional.pad(flat, (0, 1), value=math.sqrt(flat.shape[-1]))

    def _rectified(self, flat: Tensor, routing: Routing) -> Tensor:
        """The coefficients, zero where the activation rectifies the latent value."""
        if self.options.activation == "none":
            return routing.coefficients
        # relu(a) is a where a > 0.
        latents: Tensor = self.bank(flat, routing.indices)
        return routing.coefficients * (latents > 0)

    def delta_weight(self, x: Tensor, router_input: Tensor | None = None) -> Tensor:
        """The composed weight dW of each token, equation (4) with gamma, for inspection.

        Args:
            x: Tokens of shape (..., d_in).
            router_input: What the router sees in place of ``x``, see :meth:`RoutedLayer.forward`.

        Returns:
            Tensor of shape (..., d_in, d_out) with ``y = x dW``, or ``x dW + o`` with an offset, in the dtype of ``x``.
        """
        left, right = self.factors(x, router_input)
        return torch.einsum("...ki,...ko->...io", left, right).to(x.dtype)

    def factors(self, x: Tensor, router_input: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The rank-K factors of dW: u_k of shape (..., K, d_in), and ``z_k v_k scale gamma`` of (..., K, d_out)."""
        routing = self.route(x if router_input is None else router_input)
        u, v = self.bank(None, routing.indices, eps=self.options.eps)
        flat = self._cast(self._flatten(x), self.parameter_dtype)
        if self.reduce is not None and self.expand is not None:
            flat = self.reduce(flat).to(flat.dtype)
            v = v @ whole(self.expand.weight).mT
        flat = self._with_constant(flat)
        coefficients = self._rectified(flat, routing.reshape(flat.shape[0])).view_as(routing.coefficients)
        u = u[..., : u.shape[-1] - 1] if self.options.offset else u
        if self.reduce is not None:
            u = u @ whole(self.reduce.weight)
        dtype = coefficients.dtype
        right = coefficients.unsqueeze(-1) * v.to(dtype) * self.output_scale.to(dtype)
        return u.to(dtype), right

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *arguments: Any) -> None:
        gamma = state_dict.get(f"{prefix}gamma")
        if isinstance(gamma, Tensor) and gamma.dim() == 0:
            state_dict[f"{prefix}gamma"] = gamma.reshape(1)
        super()._load_from_state_dict(state_dict, prefix, *arguments)

    def extra_repr(self) -> str:
        """Sizes and kinds, for ``print(model)``."""
        o = self.options
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, num_atoms={o.num_atoms}, "
            f"top_k={o.top_k}, gate={o.gate!r}, impl={o.impl!r}"
        )
