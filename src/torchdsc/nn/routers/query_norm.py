"""BatchNorm of the queries of product keys, as published."""

import torch
from torch import Tensor, nn

from .base import parameter_like

_EPS, _MOMENTUM = 1e-5, 0.1


class QueryBatchNorm(nn.Module):
    """``(q - mean) / sqrt(variance + 1e-5) * weight + bias``, feature by feature, over the tokens of a pass.

    In evaluation it takes running statistics, to which each pass in training adds a tenth of its own (of the variance
    without bias, as ``nn.BatchNorm1d``). It differs from that in that tokens may be left out, and that it computes in
    the input's dtype, whatever that of its parameters. A pass that activation checkpointing recomputes has the same
    result, and adds its statistics again.

    Args:
        features: Of all queries of a token.
        device: Where the parameters live.
        dtype: Their dtype.

    Attributes:
        weight: Shape (features,), one at the start.
        bias: Likewise, zero at the start.
        running_mean: Shape (features,), zero at the start.
        running_variance: Likewise, one at the start.
    """

    running_mean: Tensor
    running_variance: Tensor

    def __init__(
        self, features: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(features, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(features, device=device, dtype=dtype))
        self.register_buffer("running_mean", torch.empty(features, device=device, dtype=dtype))
        self.register_buffer("running_variance", torch.empty(features, device=device, dtype=dtype))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """The identity, and statistics of mean zero and variance one."""
        for ones, zeros in ((self.weight, self.bias), (self.running_variance, self.running_mean)):
            nn.init.ones_(ones)
            nn.init.zeros_(zeros)

    def forward(self, query: Tensor, token_mask: Tensor | None = None) -> Tensor:
        """Normalise queries (..., features); tokens that are False in ``token_mask`` (...) do not count in training."""
        if self.training:
            mean, variance = self._statistics(query, token_mask)
        else:
            mean, variance = (parameter_like(each, query) for each in (self.running_mean, self.running_variance))
        weight, bias = parameter_like(self.weight, query), parameter_like(self.bias, query)
        return (query - mean) * (variance + _EPS).rsqrt() * weight + bias

    def _statistics(self, query: Tensor, token_mask: Tensor | None) -> tuple[Tensor, Tensor]:
        rows = query.reshape(-1, query.shape[-1])
        left_out = None if token_mask is None else ~token_mask.reshape(-1, 1)
        tokens = rows.new_tensor(rows.shape[0]) if left_out is None else (~left_out).sum().to(rows.dtype)

        def mean_of(values: Tensor) -> Tensor:
            # Not a product: tokens that do not count may be NaN.
            values = values if left_out is None else values.masked_fill(left_out, 0.0)
            return values.sum(0) / tokens.clamp_min(1.0)

        mean = mean_of(rows)
        variance = mean_of((rows - mean).square())
        with torch.no_grad():
            # A pass without tokens has nothing to add.
            share = _MOMENTUM * (tokens > 0).to(rows.dtype)
            unbiased = variance * (tokens / (tokens - 1).clamp_min(1.0))
            for running, own in ((self.running_mean, mean), (self.running_variance, unbiased)):
                running += (share * (own - running)).to(running.dtype)
        return mean, variance
