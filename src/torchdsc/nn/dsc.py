"""The DSC layer: ``x -> x dW(z(x))``."""

from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn

from torchdsc.arguments import check_at_least, check_types
from torchdsc.ops import Selection, gate

from .bank import BasisBank
from .options import DSCOptions
from .routers import Router, build_router
from .sharding import check_not_flattened, whole
from .statistics import RoutedLayer, check_token_mask, sum_statistics
from .statistics_log import RoutingStatistics


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

    It maps x to the update x dW(z(x)) alone; :class:`Residual` adds it to a base. The default is the paper's
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
        gamma: Learned output scale of shape (d_out,), or (1,) for Algorithm 1. A state of shape (), as it was saved
            before, loads as well.

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
        # Not a scalar, which FSDP takes for no parameter.
        shape = (self.out_features if self.options.channelwise_gamma else 1,)
        self.gamma = nn.Parameter(torch.full(shape, self.options.gamma_init, device=device, dtype=dtype))

    @classmethod
    def basic(cls, in_features: int, out_features: int | None = None, **options: Any) -> Self:
        """Algorithm 1: the router sees x itself, and gamma is a scalar."""
        return cls(in_features, out_features, **{"router_norm": "none", "channelwise_gamma": False, **options})

    @property
    def output_scale(self) -> Tensor:
        """``scale gamma``, of the shape of gamma."""
        gamma = whole(self.gamma)
        return gamma if self.options.scale == 1.0 else gamma * self.options.scale

    def regularizer_factor(self) -> Tensor | None:
        """See :class:`RoutedLayer`: 0 as long as a gamma that starts at zero has not moved.

        The task gives bank and router no gradient then. Adam, which divides by a gradient's size, would follow the
        regularisers alone, at its full rate.
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
        nn.init.constant_(self.gamma, self.options.gamma_init)

    def _forward(
        self, x: Tensor, token_mask: Tensor | None, router_input: Tensor | None
    ) -> tuple[Tensor, RoutingStatistics | None]:
        options = self.options
        if self.training and torch.is_grad_enabled() and options.gate == "none" and options.top_k == 1:
            raise ValueError(
                "gate must be 'sum' or 'mean' to train with top_k = 1, got 'none': the coefficient would always be 1, "
                "and the router get no gradient from the task"
            )
        flat, mask = self._tokens(x), check_token_mask(token_mask, x)
        collect = self.training and self.regularizers.need_tokens
        flat, routed, with_lost = self._shut_out(flat, self._flatten_router_input(router_input, x, flat), mask)
        selection = self._select(routed, mask, collect and self.regularizers.need_logits)
        coefficients, strength = self._gate(flat, selection)
        y = self.bank(flat, selection.indices, coefficients, eps=options.eps, impl=options.impl)
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
        flat = self._tokens(x)
        selection = self._select(self._flatten_router_input(router_input, x, flat))
        coefficients, strength = self._gate(flat, selection)
        shape = (*x.shape[:-1], self.options.top_k)
        return Routing(
            selection.indices.reshape(shape),
            coefficients.reshape(shape),
            selection.logits.reshape(shape),
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
        u, v = self.bank(None, routing.indices, eps=self.options.eps)
        dtype = routing.coefficients.dtype
        right = routing.coefficients.unsqueeze(-1) * v.to(dtype) * self.output_scale.to(dtype)
        return u.to(dtype), right

    def _tokens(self, x: Tensor) -> Tensor:
        return self._flatten(x, self.in_features, self.gamma.dtype)

    def _select(self, routed: Tensor, token_mask: Tensor | None = None, statistics: bool = False) -> Selection:
        """The selection by what the router sees, of shape (T, d_in)."""
        selection: Selection = self.router(
            routed,
            self.options.top_k,
            logit_clamp=self.options.logit_clamp,
            token_mask=token_mask,
            statistics=statistics,
            raw_normalizer=self.options.z_loss_on_raw_logits and self.regularizers.z > 0,
        )
        return selection

    def _gate(self, flat: Tensor, selection: Selection) -> tuple[Tensor, Tensor]:
        """Coefficients, of zero where the activation rectifies a latent value, and the signal strength."""
        options = self.options
        coefficients, strength = gate(
            selection.logits, logit_clamp=options.logit_clamp, eps=options.eps, kind=options.gate
        )
        if options.activation == "relu":
            # relu(a) is a where a > 0.
            coefficients = coefficients * (self.bank(flat, selection.indices) > 0)
        return coefficients, strength

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
