"""The DSC layer: ``x -> x dW(z(x))``."""

from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn

from torchdsc.arguments import check_at_least, check_types
from torchdsc.ops import compose, gate, latents

from .bank import BasisBank
from .options import DSCOptions
from .routers import Router, build_router
from .statistics import RoutedLayer, RoutingStatistics, check_token_mask, sum_statistics


class Routing(NamedTuple):
    """What a layer selects for each token.

    Attributes:
        indices: Selected atoms I(x), int64 of shape (..., K), by falling logit (of each head).
        coefficients: Their coefficients z, equation (5), of shape (..., K).
        logits: Their raw logits, of shape (..., K).
        strength: Signal strength S, of shape (...).
    """

    indices: Tensor
    coefficients: Tensor
    logits: Tensor
    strength: Tensor


class DSC(RoutedLayer):
    """Dynamic Subspace Composition: ``y = scale gamma * ((x U_I^T) * z) V_I``, equations (4), (5) and (14).

    It maps x to the update x dW(z(x)) alone; :class:`DSCResidual` adds it to a base. The default is the paper's
    Algorithm 2, ``DSC.basic(...)`` its Algorithm 1. With ``activation="relu"`` the latent values x . u_k are rectified:
    ``y = scale gamma * (relu(x U_I^T) * z) V_I``. ``|dW|_2 < scale max |gamma|`` for every token, equations (7), (8).

    Args:
        in_features: d_in.
        out_features: d_out; ``in_features`` by default.
        bank: Bank to share; a new one by default.
        device: Where new parameters live.
        dtype: Their dtype.
        **options: The fields of :class:`DSCOptions`; ``num_atoms`` and ``top_k`` are required.

    Attributes:
        bank: The atoms, a :class:`BasisBank`; raw rows ``bank.u`` (M, d_in) and ``bank.v`` (M, d_out).
        router: Tokens to scores; the linear router's ``router.weight`` is (M, d_in).
        gamma: Learned output scale of shape (d_out,), or () for Algorithm 1.

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
        *,
        bank: BasisBank | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        check_types(DSC.__init__, locals())
        check_at_least(1, in_features=in_features, out_features=out_features)
        self.options = DSCOptions(**options)
        self.regularizers = self.options.regularizers
        self.in_features = in_features
        self.out_features = in_features if out_features is None else out_features
        num_atoms = self.options.num_atoms
        if bank is None:
            norm = self.options.atom_init_norm
            bank = BasisBank(
                num_atoms,
                in_features,
                self.out_features,
                init_norm=norm,
                sparse_gradients=self.options.sparse_gradients,
                device=device,
                dtype=dtype,
            )
        sizes = (bank.num_atoms, bank.in_features, bank.out_features)
        if sizes != (num_atoms, self.in_features, self.out_features):
            raise ValueError(
                "bank must have (num_atoms, in_features, out_features) = "
                f"{(num_atoms, self.in_features, self.out_features)}, got {sizes}"
            )
        if bank.sparse_gradients != self.options.sparse_gradients:
            raise ValueError(
                f"bank must have sparse_gradients = {self.options.sparse_gradients}, got {bank.sparse_gradients}"
            )
        self.bank = bank
        self.router = build_router(in_features, self.options, device, dtype)
        shape = (self.out_features,) if self.options.channelwise_gamma else ()
        self.gamma = nn.Parameter(torch.full(shape, self.options.gamma_init, device=device, dtype=dtype))

    @classmethod
    def basic(cls, in_features: int, out_features: int | None = None, **options: Any) -> Self:
        """Algorithm 1: the router sees x itself, and gamma is a scalar."""
        return cls(in_features, out_features, **{"router_norm": "none", "channelwise_gamma": False, **options})

    @property
    def output_scale(self) -> Tensor:
        """``scale gamma``, of the shape of gamma."""
        return self.gamma if self.options.scale == 1.0 else self.gamma * self.options.scale

    def regularizer_factor(self) -> Tensor | None:
        """See :class:`RoutedLayer`: 0 as long as a gamma that starts at zero has not moved.

        The task gives bank and router no gradient then. Adam, which divides by a gradient's size, would follow the
        regularisers alone, at its full rate.
        """
        return None if self.options.gamma_init != 0 else (self.gamma.detach() != 0).any()

    def reset_parameters(self) -> None:
        """Initialise the bank (shared or not), the router and gamma again."""
        self.bank.reset_parameters()
        self.router.reset_parameters()
        nn.init.constant_(self.gamma, self.options.gamma_init)

    def forward_with_statistics(
        self, x: Tensor, token_mask: Tensor | None = None, router_input: Tensor | None = None
    ) -> tuple[Tensor, RoutingStatistics | None]:
        """See :class:`RoutedLayer`."""
        options = self.options
        if self.training and torch.is_grad_enabled() and options.gate == "none" and options.top_k == 1:
            raise ValueError(
                "gate must be 'sum' or 'mean' to train with top_k = 1, got 'none': the coefficient would always be 1, "
                "and the router get no gradient from the task"
            )
        flat, mask = self._tokens(x), check_token_mask(token_mask, x)
        collect = self.training and self.regularizers.need_tokens
        flat, routed, with_lost = self._shut_out(flat, self._flatten_router_input(router_input, x, flat), mask)
        selection = self.router.select(
            routed,
            options.top_k,
            logit_clamp=options.logit_clamp,
            token_mask=mask,
            statistics=collect and self.regularizers.need_logits,
            raw_normalizer=options.z_loss_on_raw_logits and self.regularizers.z > 0,
        )
        coefficients, strength = self._gate(selection.logits)
        coefficients = self._rectified(coefficients, flat, selection.indices)
        u, v, indices = self.bank.rows(selection.indices)
        y = compose(flat, u, v, indices, coefficients, eps=options.eps, impl=options.impl)
        # In inference in place: what compose returns is new.
        inference = not torch.is_grad_enabled() and not torch.compiler.is_compiling()
        scale = self.output_scale
        y = with_lost(y.mul_(scale) if inference and y.dtype == scale.dtype else y * scale)
        if y.dtype != x.dtype:
            y = y.to(x.dtype)
        if x.dim() != 2:
            y = y.reshape(*x.shape[:-1], self.out_features)
        if not collect:
            return y, None
        return y, sum_statistics(strength, selection.log_normalizer, selection.probability_sum, mask)

    def route(self, x: Tensor, router_input: Tensor | None = None) -> Routing:
        """What is selected for tokens x of shape (..., d_in), and with which coefficients; see :meth:`forward`."""
        flat, options = self._tokens(x), self.options
        routed = self._flatten_router_input(router_input, x, flat)
        top_logits, indices = self.router.select(routed, options.top_k, logit_clamp=options.logit_clamp)[:2]
        coefficients, strength = self._gate(top_logits)
        coefficients = self._rectified(coefficients, flat, indices)
        shape = (*x.shape[:-1], options.top_k)
        return Routing(
            indices.reshape(shape),
            coefficients.reshape(shape),
            top_logits.reshape(shape),
            strength.reshape(x.shape[:-1]),
        )

    def delta_weight(self, x: Tensor, router_input: Tensor | None = None) -> Tensor:
        """The composed weights dW of equation (4), gamma included, one matrix a token: for inspection.

        Args:
            x: Tokens of shape (..., d_in).
            router_input: What the router sees in place of ``x``, of its shape.

        Returns:
            Tensor of shape (..., d_in, d_out) with ``y = x dW``, in the dtype of ``x``.
        """
        left, right = self.factors(x, router_input)
        return torch.einsum("...ki,...ko->...io", left, right).to(x.dtype)

    def factors(self, x: Tensor, router_input: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The rank-K factors of dW: rows u_k, (..., K, d_in), and ``z_k v_k scale gamma``, (..., K, d_out)."""
        routing = self.route(x, router_input)
        u, v = self.bank.unit(self.options.eps)
        dtype = routing.coefficients.dtype
        right = routing.coefficients.unsqueeze(-1) * v[routing.indices].to(dtype) * self.output_scale.to(dtype)
        return u[routing.indices].to(dtype), right

    def _tokens(self, x: Tensor) -> Tensor:
        return self._flatten(x, self.in_features, self.bank.u.dtype)

    def _rectified(self, coefficients: Tensor, x: Tensor, indices: Tensor) -> Tensor:
        """Coefficients of zero where a latent value is negative: relu(a) is a where a > 0."""
        if self.options.activation == "none":
            return coefficients
        return coefficients * (latents(x, self.bank.u, indices) > 0)

    def _gate(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        options = self.options
        return gate(logits, logit_clamp=options.logit_clamp, eps=options.eps, kind=options.gate)

    def extra_repr(self) -> str:
        """Sizes and kinds, for ``print(model)``."""
        o = self.options
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, num_atoms={o.num_atoms}, "
            f"top_k={o.top_k}, gate={o.gate!r}, impl={o.impl!r}"
        )
