import pytest
import torch
from torch import library

from torchdsc.ops import select


def autograd_version(logits, top_k, logit_clamp, token_mask):
    """The same statistics, term by term, left to autograd."""
    values, indices = logits.topk(top_k)
    clamped = logits.clamp(-logit_clamp, logit_clamp)
    weights = torch.ones_like(logits[:, 0]) if token_mask is None else token_mask.to(logits.dtype)
    return values, indices, clamped.logsumexp(-1), (clamped.softmax(-1) * weights.unsqueeze(1)).sum(0)


@pytest.mark.parametrize("tokens", [0, 1, 63, 700])
@pytest.mark.parametrize("logit_clamp", [20.0, 1.5])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("top_k", [1, 4, 1030])
def test_equals_separate_operations(tokens, logit_clamp, masked, top_k):
    logits = torch.randn(tokens, 1030, dtype=torch.float64).requires_grad_()
    mask = torch.rand(tokens) > 0.3 if masked else None
    expected = autograd_version(logits, top_k, logit_clamp, mask)
    actual = select(logits, top_k, logit_clamp=logit_clamp, token_mask=mask)
    weights = [torch.randn_like(t) if t.is_floating_point() else None for t in expected]
    gradients = []
    for outputs in (expected, actual):
        loss = sum((o * w).sum() for o, w in zip(outputs, weights, strict=True) if w is not None)
        gradients.append(torch.autograd.grad(loss, logits)[0])
    assert torch.equal(actual.indices, expected[1])
    for i in (0, 2, 3):
        torch.testing.assert_close(actual[i], expected[i], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_without_statistics(dtype):
    logits = torch.randn(9, 70, dtype=dtype).requires_grad_()
    expected = logits.topk(5)
    actual = select(logits, 5, logit_clamp=20.0, statistics=False)
    assert torch.autograd.grad(actual.logits.sum(), logits)[0].count_nonzero() == 9 * 5
    with torch.no_grad():
        inference = select(logits, 5, logit_clamp=20.0, statistics=False)
    for found in (actual, inference):
        assert torch.equal(found.logits, expected.values)
        assert torch.equal(found.indices, expected.indices)
        assert found.log_normalizer.numel() == found.probability_sum.numel() == 0


@pytest.mark.parametrize("logit_clamp", [20.0, 1.0])
def test_gradcheck(logit_clamp):
    logits = (torch.randn(4, 7, dtype=torch.float64) * 2).requires_grad_()
    mask = torch.tensor([True, False, True, True])

    def differentiable(logits):
        s = select(logits, 3, logit_clamp=logit_clamp, token_mask=mask)
        return s.logits, s.log_normalizer, s.probability_sum

    assert torch.autograd.gradcheck(differentiable, (logits,))


def test_extreme_logits_stay_finite():
    logits = torch.tensor([[1e30, -1e30, 0.0], [-1e30, -1e30, -1e30]])
    selection = select(logits, 1, logit_clamp=20.0)
    assert selection.log_normalizer.isfinite().all()
    torch.testing.assert_close(selection.log_normalizer, logits.clamp(-20, 20).logsumexp(-1))


def test_not_finite_logits_are_selected_first():
    logits = torch.randn(3, 50)
    logits[1, 17] = torch.nan
    selection = select(logits, 2, logit_clamp=20.0)
    assert selection.logits[1, 0].isnan()
    assert selection.logits[[0, 2]].isfinite().all()


def test_opcheck():
    logits = torch.randn(6, 11, requires_grad=True)
    weights = torch.rand(6)
    library.opcheck(torch.ops.torchdsc.select.default, (logits, weights, 3, 20.0))


@pytest.mark.parametrize("top_k", [0, 12])
def test_top_k_out_of_range(top_k):
    with pytest.raises(ValueError, match=rf"top_k must be in \[1, num_atoms = 11\], got {top_k}"):
        select(torch.zeros(3, 11), top_k, logit_clamp=20.0)


def test_mask_of_another_shape():
    with pytest.raises(ValueError, match=r"token_mask must have shape \(3,\), got \(4,\)"):
        select(torch.zeros(3, 11), 2, logit_clamp=20.0, token_mask=torch.ones(4, dtype=torch.bool))
