"""The compiled mix of tokens against the tensor operations that stand in for it; those against a loop in nn."""

import pytest
import torch
from torch import library

from torchdsc.ops import mix, native, short_convolution

pytestmark = pytest.mark.skipif(native._native is None, reason="the optional compiled part was not built")


def by_tensor_operations(monkeypatch, *arguments):
    with monkeypatch.context() as patch:
        patch.setattr(native, "_native", None)
        return short_convolution(*arguments)


@pytest.mark.parametrize("shape", [(3, 7, 33), (130, 16), (1, 1, 5), (2, 3, 65, 48), (2, 2, 1), (0, 4, 8), (2, 0, 8)])
@pytest.mark.parametrize("taps", [1, 2, 4, 16, 17])
@pytest.mark.parametrize("added", [False, True])
def test_equals_tensor_operations(monkeypatch, shape, taps, added):
    inputs = [torch.randn(s, requires_grad=True) for s in (shape, (taps, shape[-1]), *([shape] * added))]
    grad = torch.randn(shape)
    x, weight, onto = (*inputs, None)[:3]
    found = short_convolution(x, weight, shape[-2], None, onto)
    gradients = torch.autograd.grad(found, inputs, grad)
    precise = [t.detach().double().requires_grad_() for t in inputs]
    expected = by_tensor_operations(monkeypatch, *precise[:2], shape[-2], None, precise[2] if added else None)
    for actual, exact in zip(
        (found, *gradients), (expected, *torch.autograd.grad(expected, precise, grad.double())), strict=True
    ):
        torch.testing.assert_close(actual.double(), exact, rtol=2e-6, atol=2e-5)
    with torch.no_grad():
        assert torch.equal(short_convolution(x, weight, shape[-2], None, onto), found)


def test_the_compiled_functions_are_what_is_taken(monkeypatch):
    taken = []
    monkeypatch.setattr(mix, "_mix", lambda x, weight, onto: taken.append(1) or torch.zeros_like(x))
    x, weight = torch.randn(2, 6, 8), torch.randn(3, 8)
    with torch.no_grad():
        short_convolution(x, weight, 6)
        assert taken
        taken.clear()
        positions = torch.arange(6)
        for arguments in (
            (x, weight, 5),
            (x, weight, 6, positions),
            (x.double(), weight.double(), 6),
            (x.mT.mT[:, ::2], weight, 3),
        ):
            short_convolution(*arguments)
    assert not taken


def test_an_expanded_gradient(monkeypatch):
    x, weight = torch.randn(2, 6, 8, requires_grad=True), torch.randn(3, 8, requires_grad=True)
    found = torch.autograd.grad(short_convolution(x, weight, 6).sum(), (x, weight))
    expected = torch.autograd.grad(by_tensor_operations(monkeypatch, x, weight, 6).sum(), (x, weight))
    for actual, exact in zip(found, expected, strict=True):
        torch.testing.assert_close(actual, exact)


def test_rows_that_are_not_finite_reach_no_other_sequence():
    x, weight = torch.randn(2, 5, 4), torch.randn(3, 4)
    x[0, 3, 1] = torch.nan
    y = short_convolution(x, weight, 5)
    assert y[0, 3:, 1].isnan().all()
    assert y[0, :3].isfinite().all()
    assert y[1].isfinite().all()


def test_opcheck():
    x, weight = torch.randn(2, 6, 8, requires_grad=True), torch.randn(3, 8, requires_grad=True)
    library.opcheck(mix._mix_op, (x, weight, None))
    library.opcheck(mix._mix_op, (x, weight, torch.randn(2, 6, 8, requires_grad=True)))


def test_more_than_can_be_mixed_is_an_error():
    x, weight = torch.randn(1, 4, 2), torch.randn(native.MOST_MIXED + 1, 2)
    module = native.module_for(x)
    with pytest.raises(ValueError, match=r"taps must be in \[1, 16\], got 17"):
        module.short_convolution(*map(native.address, (x, weight, None, torch.empty_like(x))), 1, 4, 2, 17, 1)
