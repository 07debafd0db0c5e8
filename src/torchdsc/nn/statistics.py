"""What one forward pass of a routed layer leaves for the regularisers."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from torchdsc.arguments import check_at_least, check_not_negative, check_positive, check_types

from .statistics_log import RoutingStatistics, StatisticsLog


@dataclass(frozen=True)
class RegularizerWeights:
    """Weights of equation (13) and the constants of its terms; see :class:`torchdsc.DSCOptions`.

    Raises:
        TypeError: If a value has another type.
        ValueError: If a weight is negative or not finite, by the name that layers give it, or a constant out of range.
    """

    aux: float = 0.0
    budget: float = 0.0
    frame: float = 0.0
    z: float = 0.0
    budget_target: float = 1.0
    frame_normalized: bool = False
    frame_samples: int | None = None
    eps: float = 1e-6

    def __post_init__(self) -> None:
        check_types(RegularizerWeights, vars(self))
        check_not_negative(aux_weight=self.aux, budget_weight=self.budget, frame_weight=self.frame, z_weight=self.z)
        check_not_negative(budget_target=self.budget_target)
        check_at_least(2, frame_samples=self.frame_samples)
        check_positive(eps=self.eps)

    @property
    def need_logits(self) -> bool:
        """Whether a term needs the softmax over all atoms."""
        return self.aux > 0 or self.z > 0

    @property
    def need_tokens(self) -> bool:
        """Whether a term depends on the data."""
        return self.need_logits or self.budget > 0

    @property
    def any(self) -> bool:
        """Whether any term has a weight."""
        return self.need_tokens or self.frame > 0


def check_token_mask(token_mask: Tensor | None, x: Tensor) -> Tensor | None:
    """Flatten a mask to the tokens of ``x``; a ValueError if its shape is not ``x.shape[:-1]``."""
    if token_mask is None:
        return None
    if token_mask.shape != x.shape[:-1]:
        raise ValueError(f"token_mask must have shape {tuple(x.shape[:-1])}, got {tuple(token_mask.shape)}")
    return token_mask.reshape(-1).bool()


class RoutedLayer(nn.Module):
    """A layer that routes tokens and has regularisers: what :func:`torchdsc.regularization` looks for in a model.

    Subclasses set ``regularizers`` and ``router`` and implement :meth:`_forward`.
    """

    # Whether ``token_mask`` and ``router_input`` are among the arguments of a call, for models around it.
    takes_router_input = True
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
        with_statistics: bool = False,
    ) -> Tensor | tuple[Tensor, RoutingStatistics | None]:
        """Map tokens, and in training leave what :func:`torchdsc.regularization` collects.

        Args:
            x: Tokens of shape (..., d_in), in the dtype of the parameters (any under autocast). Zero tokens are valid.
            token_mask: Optional, of shape (...): tokens that are False (padding) do not count in the regularisers,
                whatever they hold. Where they are not finite and the loss does not look at them, they leave no trace in
                the layer's gradients either.
            router_input: What the router sees in place of ``x``, of its shape: tokens mixed with those before them
                (:class:`ShortConvolution`), say. The update is still composed of ``x``.
            with_statistics: Return the statistics instead of keeping them, see :meth:`forward_with_statistics`.

        Returns:
            Tensor of shape (..., d_out) and the dtype of ``x``. A token whose top logits are not finite comes out NaN.

        Raises:
            ValueError: If ``x``, ``token_mask`` or ``router_input`` has another shape.
            TypeError: If the dtype of ``x`` or ``router_input`` is not that of the parameters.
            RuntimeError: In the backward pass, if the regularisers have not been collected by then.
        """
        y, statistics = self._forward(x, token_mask, router_input)
        if with_statistics:
            return y, statistics
        self.leave_statistics(statistics, y)
        return y

    def forward_with_statistics(
        self, x: Tensor, token_mask: Tensor | None = None, router_input: Tensor | None = None
    ) -> tuple[Tensor, RoutingStatistics | None]:
        """``forward`` without side effects: returns the statistics too, None outside training or without weights.

        A model that checkpoints its blocks returns them through the checkpoint and hands them to
        :func:`torchdsc.losses.regularization_of`, or to :meth:`leave_statistics`.
        """
        # Through the call, so that hooks that bring parameters here (offloading, sharding) are run.
        found: tuple[Tensor, RoutingStatistics | None] = self(x, token_mask, router_input, with_statistics=True)
        return found

    def _forward(
        self, x: Tensor, token_mask: Tensor | None, router_input: Tensor | None
    ) -> tuple[Tensor, RoutingStatistics | None]:
        """What subclasses implement: :meth:`forward_with_statistics`, inside the module's call."""
        raise NotImplementedError

    def leave_statistics(self, statistics: RoutingStatistics | None, output: Tensor) -> None:
        """Leave the statistics of a forward pass for :func:`torchdsc.regularization`; nothing outside training.

        Args:
            statistics: What :meth:`forward_with_statistics` returned.
            output: The tensor that a backward pass reaches before this layer: its output, or that of a block around it.
        """
        if self.training and self.regularizers.any:
            self.statistics_log.leave(statistics, output, is_wanted=self._trains_regularizers())

    def _trains_regularizers(self) -> bool:
        parts = [self.router] if self.regularizers.need_tokens else []
        bank = getattr(self, "bank", None)
        if self.regularizers.frame > 0 and isinstance(bank, nn.Module):
            parts.append(bank)
        return any(parameter.requires_grad for part in parts for parameter in part.parameters())

    def regularizer_factor(self) -> Tensor | None:
        """Scalar that the weights of this layer's regularisers are multiplied by; None for 1."""
        return None

    def _flatten(self, x: Tensor, in_features: int, dtype: torch.dtype) -> Tensor:
        """Tokens of shape (T, d_in) in the dtype of the parameters, or the error that says what is wrong."""
        if x.dim() == 0 or x.shape[-1] != in_features:
            raise ValueError(f"x must have shape (..., in_features = {in_features}), got {tuple(x.shape)}")
        if x.dtype != dtype:
            if not torch.is_autocast_enabled(x.device.type) or not x.is_floating_point():
                raise TypeError(f"x must have the dtype of the parameters, {dtype}, got {x.dtype}")
            x = x.to(dtype)
        return x if x.dim() == 2 else x.reshape(-1, in_features)

    def _flatten_router_input(self, router_input: Tensor | None, x: Tensor, flat: Tensor) -> Tensor:
        """What the router sees of tokens ``x``, which are ``flat`` already, or the error that says what is wrong."""
        if router_input is None:
            return flat
        if router_input.shape != x.shape:
            raise ValueError(
                f"router_input must have the shape of x, {tuple(x.shape)}, got {tuple(router_input.shape)}"
            )
        return self._flatten(router_input, flat.shape[-1], flat.dtype)

    def _shut_out(
        self, flat: Tensor, routed: Tensor, mask: Tensor | None
    ) -> tuple[Tensor, Tensor, Callable[[Tensor], Tensor]]:
        """Tokens, and what the router sees of them, for a forward pass whose gradients masked tokens cannot spoil.

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
