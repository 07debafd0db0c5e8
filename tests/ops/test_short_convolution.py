"""The compiled short convolution against the tensor operations that stand in for it; those against a loop in nn."""

import importlib

import pytest
import torch
from torch import library

from torchdsc.ops import native, short_convolution

# The package's attribute of this name is the function.
module = importlib.import_module("torchdsc.ops.short_convolution")

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


@pytest.mark.parametrize("shape", [(3, 7, 33), (130, 16), (1, 1, 5), (2, 3, 65, 48)])
@pytest.mark.parametrize("taps", [1, 3, 16, 20])
@pytest.mark.parametrize("added", [False, True])
@torch.no_grad()
def test_the_last_tokens_are_those_of_the_whole_to_the_last_bit(monkeypatch, shape, taps, added):
    """With a cache, without one, compiled or not, in training or inference, for whichever tokens are asked."""
    x, weight, onto = torch.randn(shape), torch.randn(taps, shape[-1]), torch.randn(shape) if added else None
    whole = short_convolution(x, weight, shape[-2], None, onto)
    with torch.enable_grad():
        assert torch.equal(short_convolution(x, weight.requires_grad_(), shape[-2], None, onto), whole)
    for length in {0, 1, shape[-2] // 2, shape[-2]}:
        last = None if onto is None else onto[..., shape[-2] - length :, :].contiguous()
        positions = torch.arange(shape[-2])[shape[-2] - length :]
        for arguments in ((x, weight, length, None, last), (x, weight, length, positions, last)):
            for found in (short_convolution(*arguments), by_tensor_operations(monkeypatch, *arguments)):
                assert torch.equal(found, whole[..., shape[-2] - length :, :])


def test_the_compiled_functions_are_what_is_taken(monkeypatch):
    taken = []
    compiled = module._compiled
    monkeypatch.setattr(module, "_compiled", lambda *arguments: taken.append(1) or compiled(*arguments))
    x, weight = torch.randn(2, 6, 8), torch.randn(3, 8)
    short_convolution(x, weight, 6)
    with torch.no_grad():
        short_convolution(x, weight, 6)
        short_convolution(x, weight, 1)
        assert len(taken) == 3
        positions = torch.arange(6)
        for arguments in (
            (x, weight, 6, positions),
            (x.double(), weight.double(), 6),
            (x.mT.mT[:, ::2], weight, 3),
            (x, torch.randn(17, 8), 6),
        ):
            short_convolution(*arguments)
    short_convolution(x, weight.requires_grad_(), 5)
    assert len(taken) == 3


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
    library.opcheck(module._short_convolution_op, (x, weight, None))
    library.opcheck(module._short_convolution_op, (x, weight, torch.randn(2, 6, 8, requires_grad=True)))


def test_more_taps_than_there_is_room_for_are_an_error():
    x, weight = torch.randn(1, 4, 2), torch.randn(native.MOST_TAPS + 1, 2)
    sizes = {"sequences": 1, "num_tokens": 4, "length": 4, "width": 2, "taps": 17, "threads": 1}
    with pytest.raises(ValueError, match=r"taps must be in \[1, 16\], got 17"):
        native.module_for(x).short_convolution(x=x, weight=weight, onto=None, y=torch.empty_like(x), **sizes)
