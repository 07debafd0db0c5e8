"""What routed layers share: the way of tokens through one, and what a forward pass leaves for the regularisers."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from .regularizers import RegularizerWeights
from .routing import Routing
from .statistics_log import RoutingStatistics, StatisticsLog


def check_token_mask(token_mask: Tensor | None, x: Tensor) -> Tensor | None:
    """Flatten a mask to the tokens of ``x``; a ValueError if its shape is not ``x.shape[:-1]``."""
    if token_mask is None:
        return None
    if token_mask.shape != x.shape[:-1]:
        raise ValueError(f"token_mask must have shape {tuple(x.shape[:-1])}, got {tuple(token_mask.shape)}")
    return token_mask.reshape(-1).bool()


class RoutedLayer(nn.Module):
    """A layer that routes tokens and has regularisers: what :func:`torchdsc.regularization` looks for in a model.

    Subclasses set ``in_features``, ``out_features``, ``regularizers`` and ``router`` and implement :meth:`_route` and
    :meth:`_compose`.
    """

    # Whether ``token_mask`` and ``router_input`` are among the arguments of a call, for models around it.
    takes_router_input = True
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
        """Map tokens, and in training leave what :func:`torchdsc.regularization` collects.

        Args:
            x: Tokens of shape (..., d_in), in the dtype of the parameters (any under autocast). Zero tokens are valid.
            token_mask: Optional, of shape (...): tokens that are False (padding) do not count in the regularisers,
                whatever they hold. Where they are not finite and the loss does not look at them, they leave no trace in
                the layer's gradients either.
            router_input: What the router sees in place of ``x``, of its shape: tokens mixed with those before them
                (:class:`ShortConvolution`), say. The update is still composed of ``x``.
            routing: What :meth:`route` has selected for these tokens. Its statistics are left by each call that is
                given it.

        Returns:
            Tensor of shape (..., d_out) and the dtype of ``x``. A token whose top logits are not finite comes out NaN.

        Raises:
            ValueError: If ``x``, ``token_mask``, ``router_input`` or ``routing`` has another shape, the last two are
                both given, or in training a routing was made in evaluation mode.
            TypeError: If the dtype of ``x`` or ``router_input`` is not that of the parameters.
            RuntimeError: In the backward pass, if the regularisers have not been collected by then.
        """
        flat, mask = self._cast(self._flatten(x), self.parameter_dtype), check_token_mask(token_mask, x)
        if routing is None:
            routed = flat if router_input is None else self._flatten_router_input(router_input, x, flat.dtype)
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
        """What is selected for tokens, and with which coefficients: all that a forward pass asks of the router.

        It depends on what the router sees alone, and may be made before the layer's own input is there.

        Args:
            router_input: What the router sees, of shape (..., d_in): x, where it sees nothing else.
            token_mask: See :meth:`forward`.

        Returns:
            The routing, of leading shape (...), differentiable through all but ``indices``.

        Raises:
            ValueError: If ``router_input`` or ``token_mask`` has another shape.
            TypeError: If the dtype of ``router_input`` is not that of the parameters.
        """
        flat = self._cast(self._flatten(router_input, "router_input"), self.parameter_dtype, "router_input")
        mask = check_token_mask(token_mask, router_input)
        flat, _, with_lost = self._shut_out(flat, flat, mask)
        routing = self._route(flat, mask)
        routing = routing._replace(coefficients=with_lost(routing.coefficients))
        return routing.reshape(*router_input.shape[:-1])

    def _route(self, routed: Tensor, token_mask: Tensor | None) -> Routing:
        """What subclasses implement: the routing of what the router sees, of shape (T, d_in)."""
        raise NotImplementedError

    def _compose(self, flat: Tensor, routing: Routing) -> Tensor:
        """What subclasses implement: tokens of shape (T, d_in) to (T, d_out)."""
        raise NotImplementedError

    def _given(self, routing: Routing, x: Tensor, router_input: Tensor | None) -> Routing:
        """A routing that a call was given, of shape (T, K)."""
        if router_input is not None:
            raise ValueError("router_input must be None where routing is given")
        if routing.indices.shape[:-1] != x.shape[:-1]:
            raise ValueError(
                f"routing must be of tokens of shape {tuple(x.shape[:-1])}, got {tuple(routing.indices.shape[:-1])}"
            )
        wants = self.training and self.regularizers.need_tokens and routing.leaves_statistics
        if wants and routing.statistics is None:
            raise ValueError("routing must be made in training mode for training, got one without statistics")
        return routing if x.dim() == 2 else routing.reshape(x.shape[:-1].numel())

    def leave_statistics(self, statistics: RoutingStatistics | None, output: Tensor) -> None:
        """Leave the statistics of a forward pass for :func:`torchdsc.regularization`; nothing outside training.

        Args:
            statistics: What :meth:`Routing.take_statistics` returned.
            output: The tensor that a backward pass reaches before this layer: its output, or that of a block around it.
        """
        if self.training and self.regularizers.any:
            self.statistics_log.leave(statistics, output, is_wanted=self._trains_regularizers())

    def _trains_regularizers(self) -> bool:
        parts = [self.router] if self.regularizers.need_tokens else []
        bank = getattr(self, "bank", None)
        if self.regularizers.frame > 0 and isinstance(bank, nn.Module):
            parts.append(bank)
        # FSDP1 hides the parameters that it has flattened: those are not frozen.
        wanted = [parameter.requires_grad for part in parts for parameter in part.parameters()]
        return any(wanted) or (bool(parts) and not wanted)

    def regularizer_factor(self) -> Tensor | None:
        """Scalar that the weights of this layer's regularisers are multiplied by; None for 1."""
        return None

    def _flatten(self, x: Tensor, name: str = "x") -> Tensor:
        """Tokens of shape (T, d_in), or the error that says what is wrong."""
        if x.dim() == 0 or x.shape[-1] != self.in_features:
            raise ValueError(f"{name} must have shape (..., in_features = {self.in_features}), got {tuple(x.shape)}")
        return x if x.dim() == 2 else x.reshape(-1, self.in_features)

    def _flatten_router_input(self, router_input: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
        """What the router sees of tokens ``x``, or the error that says what is wrong."""
        if router_input.shape != x.shape:
            raise ValueError(
                f"router_input must have the shape of x, {tuple(x.shape)}, got {tuple(router_input.shape)}"
            )
        return self._cast(self._flatten(router_input), dtype, "router_input")

    @property
    def parameter_dtype(self) -> torch.dtype | None:
        """What tokens must have; None where parts of the layer refuse them themselves."""
        return None

    def _cast(self, x: Tensor, dtype: torch.dtype | None, name: str = "x") -> Tensor:
        """Tokens in the dtype of the parameters, or the error that says what is wrong."""
        if dtype is None or x.dtype == dtype:
            return x
        if not torch.is_autocast_enabled(x.device.type) or not x.is_floating_point():
            raise TypeError(f"{name} must have the dtype of the parameters, {dtype}, got {x.dtype}")
        return x.to(dtype)

    def _shut_out(
        self, flat: Tensor, routed: Tensor, mask: Tensor | None
    ) -> tuple[Tensor, Tensor, Callable[[Tensor], Tensor]]:
        """Tokens, and what the router sees or says of them, so that masked ones cannot spoil gradients.

        In training, masked tokens that are not finite become zeros, because a gradient of zero times NaN is NaN in the
        sums over tokens that parameters get. The function returned puts NaN into their rows of the output.
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
        strength: Signal strength of shape (T,).
        log_normalizer: Shape (T,), or (T, heads), of which the mean counts; empty where equation (12) has no weight.
        probability_sum: Summed already, of shape (M,).
        mask: Bool of shape (T,), or None where every token counts.
        load: See :class:`RoutingStatistics`.

    Returns:
        The statistics.
    """
    squared = log_normalizer.square() if log_normalizer.dim() == 1 else log_normalizer.square().mean(1)
    num_tokens = strength.new_full((), strength.shape[0])
    if mask is not None:
        # Not by products: what does not count need not be finite.
        num_tokens, strength = mask.sum(dtype=strength.dtype), strength.masked_fill(~mask, 0.0)
        squared = squared.masked_fill(~mask, 0.0) if squared.shape[0] else squared
    return RoutingStatistics(num_tokens, probability_sum, strength.sum(), squared.sum(), load)


def forget_statistics(model: nn.Module) -> None:
    """Drop what the layers of ``model`` have kept, for example after forward passes that nothing trains on."""
    for module in model.modules():
        if isinstance(module, RoutedLayer):
            module.statistics_log.take()
