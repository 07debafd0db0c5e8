"""Sums of two halves against the selection from all M sums written out."""

import pytest
import torch

from torchdsc.ops import native, select, select_product_key


def written_out(left, right, top_k, logit_clamp, token_mask):
    """Every head's M logits, and select's answer for each head as if it were a token of its own."""
    tokens, heads, side = left.shape
    half = logit_clamp / 2
    logits = left.clamp(-half, half).unsqueeze(-1) + right.clamp(-half, half).unsqueeze(-2)
    mask = None if token_mask is None else token_mask.repeat_interleave(heads)
    found = select(logits.reshape(tokens * heads, side * side), top_k // heads, logit_clamp=1e6, token_mask=mask)
    shape = tokens, top_k
    return found.logits.view(shape), found.log_normalizer.view(tokens, heads), found.probability_sum / heads, logits


@pytest.mark.parametrize("tokens", [0, 1, 37])
@pytest.mark.parametrize(
    ("side", "heads", "top_k"), [(5, 1, 1), (6, 1, 4), (5, 2, 6), (3, 1, 9), (7, 3, 21), (1, 1, 1)]
)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("logit_clamp", [20.0, 1.0])
def test_equals_all_sums(tokens, side, heads, top_k, masked, logit_clamp):
    halves = [torch.randn(tokens, heads, side, dtype=torch.float64).requires_grad_() for _ in range(2)]
    mask = torch.rand(tokens) > 0.4 if masked else None
    *expected, logits = written_out(*halves, top_k, logit_clamp, mask)
    found = select_product_key(*halves, top_k, logit_clamp=logit_clamp, token_mask=mask, statistics=True)
    actual = found.logits, found.log_normalizer, found.probability_sum
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-12, atol=1e-13)
    # Under the clamp atoms tie: any choice among them is valid, but it must have the value that was said.
    flat = logits.reshape(tokens, heads, side * side)
    chosen = flat.gather(2, found.indices.view(tokens, heads, top_k // heads)).reshape(tokens, top_k)
    torch.testing.assert_close(chosen, found.logits, rtol=1e-12, atol=1e-13)
    assert all(len(set(row)) == len(row) for row in found.indices.view(tokens * heads, top_k // heads).tolist())
    if logit_clamp < 20:
        return
    weights = [torch.randn_like(t) for t in expected]
    gradients = [
        torch.autograd.grad(sum((o * w).sum() for o, w in zip(outputs, weights, strict=True)), halves)
        for outputs in (expected, actual)
    ]
    for a, e in zip(*reversed(gradients), strict=True):
        torch.testing.assert_close(a, e, rtol=1e-11, atol=1e-12)


@torch.no_grad()
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("tokens", [0, 1, 50])
@pytest.mark.parametrize(
    ("side", "heads", "top_k"), [(20, 2, 8), (200, 1, 4), (70, 3, 60), (8, 1, 64), (1, 2, 2), (90, 1, 64)]
)
@pytest.mark.parametrize("logit_clamp", [20.0, 1.0])
def test_inference_selects_the_same(monkeypatch, compiled, tokens, side, heads, top_k, logit_clamp):
    if not compiled:
        monkeypatch.setattr(native, "_native", None)
    # As a router gives them: one half's scores of a token lie far from the other's.
    left, right = torch.randn(heads, 2, tokens, side).permute(2, 0, 1, 3).unbind(2)
    found = select_product_key(left, right, top_k, logit_clamp=logit_clamp)
    with torch.enable_grad():
        expected = select_product_key(left, right, top_k, logit_clamp=logit_clamp)
    assert torch.equal(found.logits, expected.logits)
    half = logit_clamp / 2
    sums = left.clamp(-half, half).unsqueeze(-1) + right.clamp(-half, half).unsqueeze(-2)
    shape = tokens, heads, top_k // heads
    chosen = sums.reshape(tokens, heads, side * side).gather(2, found.indices.view(shape))
    assert torch.equal(chosen, found.logits.view(shape))
    # Among equal sums any may be taken, and none twice.
    assert (found.indices.view(shape).sort(-1).values.diff(dim=-1) > 0).all()
    assert found.log_normalizer.numel() == found.probability_sum.numel() == 0


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("gradients", [False, True])
def test_not_finite_scores_spoil_only_their_own_row(bad, gradients):
    left, right = torch.randn(2, 5, 1, 6).unbind(0)
    right[3, 0, 2] = bad
    with torch.set_grad_enabled(gradients):
        found = select_product_key(left, right, 2, logit_clamp=20.0)
    assert found.logits[3].isnan().any()
    assert found.logits[[0, 1, 2, 4]].isfinite().all()


@pytest.mark.parametrize("top_k", [0, 3, 20])
def test_top_k_must_fit(top_k):
    halves = torch.zeros(2, 4, 2, 3)
    with pytest.raises(
        ValueError, match=rf"top_k must be a multiple of heads = 2, at most 2 x 3\^2 atoms, got {top_k}"
    ):
        select_product_key(*halves, top_k, logit_clamp=20.0)


def test_halves_must_fit():
    with pytest.raises(ValueError, match=r"one shape \(T, heads, side\), got \(4, 1, 3\) and \(4, 1, 2\)"):
        select_product_key(torch.zeros(4, 1, 3), torch.zeros(4, 1, 2), 1, logit_clamp=20.0)
