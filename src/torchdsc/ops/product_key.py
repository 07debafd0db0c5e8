"""Selection by product keys: M = side^2 atoms are scored by 2 side numbers.

Atom ``i side + j`` has the logit ``r_ij = clamp(a_i, +-tau/2) + clamp(b_j, +-tau/2)``. The top-K of these sums follows
exactly from the top-K of each half, their logsumexp is the sum of the halves', and their softmax the product.
"""

import torch
from torch import Tensor

from .devices import several_devices
from .native import MOST_SELECTED, module_for
from .select import Selection

# Up to so many tokens, waking other threads costs more than the work.
_FEW_TOKENS = 16


def select_product_key(
    left: Tensor,
    right: Tensor,
    top_k: int,
    *,
    logit_clamp: float,
    token_mask: Tensor | None = None,
    statistics: bool = False,
) -> Selection:
    """Select each token's top-K of the side^2 sums ``left_i + right_j``, each half clamped to ``tau / 2``.

    Args:
        left: Scores a of shape (T, heads, side), float32 or float64.
        right: Scores b of the same shape.
        top_k: K over all heads, a multiple of their number and at most heads side^2.
        logit_clamp: tau > 0.
        token_mask: Optional bool of shape (T,); tokens that are False are left out of ``probability_sum``.
        statistics: Whether to fill ``log_normalizer`` and ``probability_sum``; they are empty otherwise.

    Returns:
        The selection, differentiable in both halves: ``logits`` and ``indices`` of shape (T, K), one head after the
        other, each sorted; ``log_normalizer`` of shape (T, heads); ``probability_sum`` of shape (M,), averaged over
        heads. An atom that two heads select occurs twice.

    Raises:
        ValueError: If shapes or devices differ, or ``top_k`` does not fit heads and atoms.
    """
    if left.dim() != 3 or left.shape != right.shape:
        raise ValueError(
            f"left and right must have one shape (T, heads, side), got {tuple(left.shape)} and {tuple(right.shape)}"
        )
    if left.device != right.device or (token_mask is not None and token_mask.device != left.device):
        raise several_devices(left=left, right=right, token_mask=token_mask)
    tokens, heads, side = left.shape
    if top_k < heads or top_k % heads or top_k > heads * side * side:
        raise ValueError(f"top_k must be a multiple of heads = {heads}, at most {heads} x {side}^2 atoms, got {top_k}")
    half = logit_clamp / 2
    top_sums = _top_sums if torch.is_grad_enabled() or torch.compiler.is_compiling() else _top_sums_untraced
    values, indices = top_sums(left, right, top_k // heads, half)
    flat = values.reshape(tokens, top_k), indices.reshape(tokens, top_k)
    if not statistics:
        empty = left.new_empty(0)
        return Selection(*flat, empty, empty)
    left, right = left.clamp(-half, half), right.clamp(-half, half)
    log_left, log_right = left.logsumexp(-1, keepdim=True), right.logsumexp(-1, keepdim=True)
    share_left, share_right = (left - log_left).exp(), (right - log_right).exp()
    if token_mask is not None:
        # Tokens that do not count may be NaN.
        share_left, share_right = (s.masked_fill(~token_mask.view(-1, 1, 1), 0.0) for s in (share_left, share_right))
    # The softmax over atoms is the outer product of the halves' softmaxes; sum it over tokens and heads.
    with torch.autocast(left.device.type, enabled=False):
        joint = share_left.reshape(-1, side).t() @ share_right.reshape(-1, side)
    return Selection(*flat, (log_left + log_right).squeeze(-1), joint.reshape(-1) / heads)


def _top_sums(left: Tensor, right: Tensor, top_k: int, half: float) -> tuple[Tensor, Tensor]:
    """The K largest clamped sums of each token and head, sorted, and their atoms; both of shape (T, heads, K)."""
    side = left.shape[-1]
    kept = min(top_k, side)
    (a, at_left), (b, at_right) = left.topk(kept), right.topk(kept)
    rows, columns = _candidates(top_k, kept, left.device)
    # Adding 0 times the raw score makes a score that is not finite NaN, which clamping would hide.
    a, b = (torch.add(score.clamp(-half, half), score, alpha=0.0) for score in (a, b))
    values, order = (a[..., rows] + b[..., columns]).topk(top_k)
    atoms = at_left[..., rows] * side + at_right[..., columns]
    return values, atoms.gather(-1, order)


def _top_sums_untraced(left: Tensor, right: Tensor, top_k: int, half: float) -> tuple[Tensor, Tensor]:
    """The same without gradients, by the compiled function if it exists."""
    tokens, heads, side = left.shape
    native = module_for(*(scores[:1, 0] for scores in (left, right))) if tokens else None
    if native is None or left.dtype != torch.float32 or top_k > MOST_SELECTED:
        return _top_sums(left, right, top_k, half)
    values = left.new_empty(tokens, heads, top_k)
    indices = torch.empty_like(values, dtype=torch.int64)
    threads = torch.get_num_threads() if tokens > _FEW_TOKENS else 1
    for head in range(heads):
        native.select_sums(
            left=left[:, head],
            right=right[:, head],
            values=values[:, head],
            indices=indices[:, head],
            tokens=tokens,
            side=side,
            top_k=top_k,
            left_stride=left.stride(0),
            right_stride=right.stride(0),
            out_stride=values.stride(0),
            threads=threads,
            half=half,
        )
    return values, indices


def _candidates(top_k: int, kept: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Pairs of ranks (i, j) in the sorted halves whose sum can be among the K largest: those with (i + 1)(j + 1) <= K.

    Any other pair has at least K pairs whose sums are no smaller.
    """
    pairs = [(i, j) for i in range(kept) for j in range(min(kept, top_k // (i + 1)))]
    rows, columns = torch.tensor(pairs, device=device).unbind(1)
    return rows, columns
