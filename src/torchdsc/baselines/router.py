"""The softmax top-k router of Mixture-of-Experts."""

from typing import Literal

import torch
from torch import Tensor, nn

from torchdsc.arguments import check_not_negative, check_positive, check_types
from torchdsc.nn import LinearRouter, Routing
from torchdsc.nn.options import RouterNorm
from torchdsc.nn.statistics import sum_statistics

Balancing = Literal["loss", "bias"]


class SoftmaxRouter(nn.Module):
    """``p = softmax(norm(x) W_r)``: selects the top-k experts of each token, weighted by p, normalised or not.

    Args:
        in_features: d.
        num_experts: N.
        top_k: Experts per token, 1 <= k <= N.
        normalize_weights: Divide the selected weights by their sum; by default if ``top_k > 1``. A single weight would
            always be 1 and give the router no gradient from the task: training with ``top_k=1`` and True raises,
            evaluation works.
        jitter: Standard deviation of normal noise added to logits in training.
        norm: LayerNorm before the router: "none", "layer" (parameter-free) or "layer_affine".
        balancing: "bias" to select experts by p + b, see :class:`StandardMoE`; "loss" to select them by p.
        bias_rate: How far :meth:`balance` moves b.
        device: Where the parameters live.
        dtype: Their dtype.

    Attributes:
        moves: The bias b in steps of ``bias_rate``, int64 of shape (N,), which no cast to half precision rounds; only
            with ``balancing="bias"``, as the next.
        load: Tokens that selected each expert since the last :meth:`balance`, int64 of shape (N,); not saved.

    Raises:
        TypeError: If an argument has another type.
        ValueError: If ``top_k`` is outside [1, num_experts], ``jitter`` negative or not finite, ``bias_rate`` not
            positive, or ``balancing`` unknown.
    """

    moves: Tensor
    load: Tensor

    def __init__(
        self,
        in_features: int,
        num_experts: int,
        top_k: int,
        *,
        normalize_weights: bool | None = None,
        jitter: float = 0.0,
        norm: RouterNorm = "none",
        balancing: Balancing = "loss",
        bias_rate: float = 0.001,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_types(SoftmaxRouter.__init__, locals())
        if not 1 <= top_k <= num_experts:
            raise ValueError(f"top_k must be in [1, num_experts = {num_experts}], got {top_k}")
        check_not_negative(jitter=jitter)
        check_positive(bias_rate=bias_rate)
        self.num_experts, self.top_k, self.jitter = num_experts, top_k, jitter
        self.normalize_weights = top_k > 1 if normalize_weights is None else normalize_weights
        self.linear = LinearRouter(in_features, num_experts, norm=norm, device=device, dtype=dtype)
        self.balancing, self.bias_rate = balancing, bias_rate
        if balancing == "bias":
            self.register_buffer("moves", torch.zeros(num_experts, dtype=torch.int64, device=device))
            self.register_buffer("load", torch.zeros(num_experts, dtype=torch.int64, device=device), persistent=False)

    @torch.no_grad()
    def count(self, load: Tensor) -> None:
        """Add the load (N,) of some tokens to that which :meth:`balance` goes by."""
        self.load += load.to(self.load.dtype)

    @torch.no_grad()
    def balance(self) -> None:
        """``b += bias_rate sign(mean load - load)``, with the load that was counted since the last call."""
        self.moves += (self.load.sum() - self.num_experts * self.load).sign()
        self.load.zero_()

    def forward(self, x: Tensor, token_mask: Tensor | None = None, collect: bool = False) -> Routing:
        """Route tokens x of shape (T, d); weights and statistics are float32 (float64 for float64 input).

        Raises:
            ValueError: In training, if the weights are always 1.
        """
        if self.training and torch.is_grad_enabled() and self.normalize_weights and self.top_k == 1:
            raise ValueError(
                "normalize_weights must be False to train with top_k = 1, got True: the weight would always be 1, and "
                "the router get no gradient from the task"
            )
        logits: Tensor = self.linear(x)
        if self.training and self.jitter > 0:
            logits = logits + self.jitter * torch.randn_like(logits)
        log_normalizer = logits.logsumexp(-1)
        probabilities = (logits - log_normalizer.unsqueeze(-1)).exp()
        if self.balancing == "bias":
            indices = (probabilities + self.bias_rate * self.moves).topk(self.top_k, dim=-1).indices
            weights = probabilities.gather(-1, indices)
        else:
            weights, indices = probabilities.topk(self.top_k, dim=-1)
        # A token whose logits are not finite must not come out finite.
        weights = torch.where(log_normalizer.isfinite().unsqueeze(-1), weights, torch.nan)
        strength = weights.sum(-1)
        if self.normalize_weights:
            weights = weights / strength.unsqueeze(-1)
        if not collect:
            return Routing(indices, weights, strength)
        counted = torch.ones_like(strength) if token_mask is None else token_mask.to(strength.dtype)
        if token_mask is not None:
            # Tokens that do not count may be NaN.
            probabilities = probabilities.masked_fill(~token_mask.unsqueeze(1), 0.0)
        load = counted.new_zeros(probabilities.shape[-1]).index_add(
            0, indices.reshape(-1), counted.unsqueeze(1).expand_as(weights).reshape(-1)
        )
        probability_sum = probabilities.sum(0)
        statistics = sum_statistics(strength, log_normalizer, probability_sum, token_mask, load)
        return Routing(indices, weights, strength, statistics=statistics)
