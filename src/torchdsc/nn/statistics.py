"""The base class of routed layers: routing, composition, and the statistics that the regularisers are made of."""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from .regularizers import RegularizerWeights
from .routing import Routing
from .statistics_log import RoutingStatistics, StatisticsLog


def check_token_mask(token_mask: Tensor | None, x: Tensor) -> Tensor | None:
    """Flatten a padding mask to bools of shape (T,).

    Raises:
        TypeError: If it has floats, whose zeros may stand for tokens that count, as in additive masks.
        ValueError: If its shape is not ``x.shape[:-1]``.
    """
    if token_mask is None:
        return None
    if token_mask.shape != x.shape[:-1]:
        raise ValueError(f"token_mask must have shape {tuple(x.shape[:-1])}, got {tuple(token_mask.shape)}")
    if token_mask.is_floating_point():
        raise TypeError(f"token_mask must hold bools or integers, True for tokens that count, got {token_mask.dtype}")
    return token_mask.reshape(-1).bool()


class RoutedLayer(nn.Module):
    """A layer that routes tokens and has regularisers, which :func:`torchdsc.regularization` collects.

    Subclasses set ``in_features``, ``out_features``, ``regularizers`` and ``router`` and implement :meth:`_route` and
    :meth:`_compose`.
    """

    # Tells a model around the layer that forward takes ``token_mask`` and ``router_input``.
    takes_router_input = True
    # Whether means for the regularisers are over all processes: see torchdsc.losses.synchronize_regularization.
    synchronizes_statistics = False
    in_features: int
    out_features: int
    regularizers: RegularizerWeights
    router: nn.Module

    def __init__(self) -> None:
        super().__init__()
        self.statistics_log = StatisticsLog()

    def forward(
        self,
        x: Tensor,
        token_mask: Tensor | None = None,
        router_input: Tensor | None = None,
        *,
        routing: Routing | None = None,
    ) -> Tensor:
        """Map tokens; in training, keep the statistics that :func:`torchdsc.regularization` collects.

        Args:
            x: Tokens of shape (..., d_in), in the dtype of the parameters (any under autocast). Zero tokens are valid.
            token_mask: Optional padding mask of shape (...). Tokens that are False do not count in the regularisers.
                If they are NaN or infinite and the loss ignores their outputs, the layer's gradients stay finite.
            router_input: What the router sees instead of ``x``, of the same shape; for example the output of a
                :class:`torchdsc.ShortConvolution`. For ``router="ngram"`` codes of n-grams, int64, (..., n).
                The composed weight is still applied to ``x``.
            routing: The result of :meth:`route` for these tokens, instead of routing here. Every call that is given a
                routing counts its statistics.

        Returns:
            Tensor of shape (..., d_out) and the dtype of ``x``. A token whose top logits are not finite comes out NaN.

        Raises:
            ValueError: If ``x``, ``token_mask``, ``router_input`` or ``routing`` has another shape, the last two are
                both given, or a routing made in evaluation mode is used in training.
            TypeError: If the dtype of ``x`` or ``router_input`` is not that of the parameters.
            RuntimeError: In the backward pass, if the regularisers have not been collected by then.
        """
        flat, mask = self._cast(self._flatten(x), self.parameter_dtype), check_token_mask(token_mask, x)
        if routing is None:
            routed = flat if router_input is None else self._flatten_router_input(router_input, flat.dtype, x)
            flat, routed, with_lost = self._shut_out(flat, routed, mask)
            routing = self._route(routed, mask)
        else:
            routing = self._given(routing, x, router_input)
            flat, coefficients, with_lost = self._shut_out(flat, routing.coefficients, mask)
            routing = routing._replace(coefficients=coefficients)
        y = with_lost(self._compose(flat, routing))
        if y.dtype != x.dtype:
            y = y.to(x.dtype)
        if x.dim() != 2:
            y = y.reshape(*x.shape[:-1], self.out_features)
        if routing.leaves_statistics:
            self.leave_statistics(routing.statistics, y)
        return y

    def route(self, router_input: Tensor, token_mask: Tensor | None = None) -> Routing:
        """Select atoms or experts for each token, with their coefficients.

        The routing depends only on the router's input, so it can be computed before the layer's own input exists.

        Args:
            router_input: What the router sees: ``x`` of shape (..., d_in), or the ``router_input`` of :meth:`forward`.
            token_mask: See :meth:`forward`.

        Returns:
            The routing, of leading shape (...); all of it but ``indices`` is differentiable.

        Raises:
            ValueError: If ``router_input`` or ``token_mask`` has another shape.
            TypeError: If the dtype of ``router_input`` is not that of the parameters.
        """
        flat = self._flatten_router_input(router_input, self.parameter_dtype)
        mask = check_token_mask(token_mask, router_input)
        flat, _, with_lost = self._shut_out(flat, flat, mask)
        routing = self._route(flat, mask)
        routing = routing._replace(coefficients=with_lost(routing.coefficients))
        return routing.reshape(*router_input.shape[:-1])

    def _route(self, routed: Tensor, token_mask: Tensor | None) -> Routing:
        """Route router inputs of shape (T, d_in); subclasses implement it."""
        raise NotImplementedError

    def _compose(self, flat: Tensor, routing: Routing) -> Tensor:
        """Map tokens (T, d_in) to (T, d_out) as routed; subclasses implement it."""
        raise NotImplementedError

    def _given(self, routing: Routing, x: Tensor, router_input: Tensor | None) -> Routing:
        """Check a routing that a call was given, and flatten it to shape (T, K)."""
        if router_input is not None:
            raise ValueError("router_input must be None where routing is given")
        if routing.indices.shape[:-1] != x.shape[:-1]:
            raise ValueError(
                f"routing must be of tokens of shape {tuple(x.shape[:-1])}, got {tuple(routing.indices.shape[:-1])}"
            )
        wants = self.training and self.regularizers.need_tokens and routing.leaves_statistics
        if wants and routing.statistics is None:
            raise ValueError("routing must be made in training mode for training, got one without statistics")
        return routing if x.dim() == 2 else routing.reshape(math.prod(x.shape[:-1]))

    def leave_statistics(self, statistics: RoutingStatistics | None, output: Tensor) -> None:
        """Keep the statistics of a forward pass for :func:`torchdsc.regularization`; does nothing outside training.

        Args:
            statistics: From :meth:`Routing.take_statistics`.
            output: A tensor that the backward pass goes through before this layer: its output, or that of a block
                around it.
        """
        if self.training and self.regularizers.any:
            self.statistics_log.leave(statistics, output, is_wanted=self._trains_regularizers())

    def after_step(self) -> None:
        """What the layer does after each step of an optimizer of :func:`torchdsc.build_optimizer`: here, nothing."""

    def _trains_regularizers(self) -> bool:
        parts = [self.router] if self.regularizers.need_tokens else []
        bank = getattr(self, "bank", None)
        if self.regularizers.frame > 0 and isinstance(bank, nn.Module):
            parts.append(bank)
        # Flattened by FSDP1, a module has no parameters: it is not frozen.
        wanted = [parameter.requires_grad for part in parts for parameter in part.parameters()]
        return any(wanted) or (bool(parts) and not wanted)

    def regularizer_factor(self) -> Tensor | None:
        """Scalar factor of the weights of this layer's regularisers; None for 1."""
        return None

    def _flatten(self, x: Tensor, name: str = "x") -> Tensor:
        """Check the shape, and flatten to (T, d_in)."""
        if x.dim() == 0 or x.shape[-1] != self.in_features:
            raise ValueError(f"{name} must have shape (..., in_features = {self.in_features}), got {tuple(x.shape)}")
        return x if x.dim() == 2 else x.reshape(-1, self.in_features)

    def _flatten_router_input(self, router_input: Tensor, dtype: torch.dtype | None, x: Tensor | None = None) -> Tensor:
        """Check the router's input, also against ``x``, and flatten it to (T, d_in)."""
        if x is not None and router_input.shape != x.shape:
            raise ValueError(
                f"router_input must have the shape of x, {tuple(x.shape)}, got {tuple(router_input.shape)}"
            )
        return self._cast(self._flatten(router_input, "router_input"), dtype, "router_input")

    @property
    def parameter_dtype(self) -> torch.dtype | None:
        """Dtype that tokens must have; None if the parts of the layer check it themselves."""
        return None

    def _cast(self, x: Tensor, dtype: torch.dtype | None, name: str = "x") -> Tensor:
        """Check the dtype; under autocast, cast to that of the parameters."""
        if dtype is None or x.dtype == dtype:
            return x
        if not torch.is_autocast_enabled(x.device.type) or not x.is_floating_point():
            raise TypeError(f"{name} must have the dtype of the parameters, {dtype}, got {x.dtype}")
        return x.to(dtype)

    def _shut_out(
        self, flat: Tensor, routed: Tensor, mask: Tensor | None
    ) -> tuple[Tensor, Tensor, Callable[[Tensor], Tensor]]:
        """Keep masked tokens that are NaN or infinite out of the gradients of the parameters.

        In training such tokens are replaced by zeros: their gradient is zero, and zero times NaN would be NaN in the
        sums over tokens.

        Args:
            flat: Tokens of shape (T, d_in).
            routed: Router inputs (T, d_in) or coefficients (T, K).
            mask: Padding mask of shape (T,), or None.

        Returns:
            Both tensors, cleaned, and a function that puts NaN back into the rows of such tokens in the output.
        """
        if mask is None or not self.training:
            return flat, routed, lambda y: y
        finite = flat.isfinite().all(-1)
        if routed is not flat:
            finite = finite & routed.isfinite().all(-1)
        lost = ~(mask | finite).unsqueeze(-1)
        cleaned = flat.masked_fill(lost, 0.0)
        routed = cleaned if routed is flat else routed.masked_fill(lost, 0.0)
        return cleaned, routed, lambda y: y.masked_fill(lost, torch.nan)


def sum_statistics(
    strength: Tensor, log_normalizer: Tensor, probability_sum: Tensor, mask: Tensor | None, load: Tensor | None = None
) -> RoutingStatistics:
    """Sum over counted tokens what equations (10) and (12) need.

    Args:
        strength: Signal strength S of shape (T,).
        log_normalizer: ``logsumexp`` of the logits, of shape (T,) or (T, heads) to be averaged over heads; empty if
            L_z has no weight.
        probability_sum: Sum over tokens of the softmax, of shape (M,).
        mask: Bool of shape (T,), False for tokens that do not count; None if all count.
        load: See :class:`RoutingStatistics`.

    Returns:
        The statistics.
    """
    squared = log_normalizer.square() if log_normalizer.dim() == 1 else log_normalizer.square().mean(1)
    num_tokens = strength.new_full((), strength.shape[0])
    if mask is not None:
        # Not products: tokens that do not count may be NaN.
        num_tokens, strength = mask.sum(dtype=strength.dtype), strength.masked_fill(~mask, 0.0)
        squared = squared.masked_fill(~mask, 0.0) if squared.shape[0] else squared
    return RoutingStatistics(num_tokens, probability_sum, strength.sum(), squared.sum(), load)


def forget_statistics(model: nn.Module) -> None:
    """Drop all uncollected statistics in ``model``, for example after forward passes that are not trained on."""
    for module in model.modules():
        if isinstance(module, RoutedLayer):
            module.statistics_log.take()
