"""The compiled functions against the tensor operations that stand in for them."""

import pytest
import torch

from torchdsc.ops import compose, gate, native

pytestmark = pytest.mark.skipif(native._native is None, reason="the optional compiled part was not built")


@pytest.fixture
def tensor_operations(monkeypatch):
    """Call a function without the compiled part."""

    def call(function):
        with monkeypatch.context() as patch:
            patch.setattr(native, "_native", None)
            return function()

    return call


@pytest.mark.parametrize("eps", [1e-6, None, 4.0])
@pytest.mark.parametrize(
    ("tokens", "atoms", "top_k", "d_in", "d_out"), [(1, 50, 4, 384, 384), (7, 9, 9, 5, 33), (2, 3, 1, 16, 1)]
)
def test_compose(tensor_operations, tokens, atoms, top_k, d_in, d_out, eps):
    x, u, v = torch.randn(tokens, d_in), torch.randn(atoms, d_in), torch.randn(atoms, d_out)
    indices, coefficients = torch.randint(atoms, (tokens, top_k)), torch.rand(tokens, top_k)

    def run(impl="gather", dtype=torch.float32):
        inputs = [t.to(dtype) for t in (x, u, v)]
        with torch.no_grad():
            return compose(*inputs, indices, coefficients.to(dtype), eps=eps, impl=impl)

    expected = run("reference", torch.float64)
    for actual in (run(), tensor_operations(run)):
        assert (actual.double() - expected).abs().max() <= 1e-6 * expected.abs().max()


@pytest.mark.parametrize("kind", ["sum", "mean", "none"])
@pytest.mark.parametrize("clamp", [20.0, 1.0])
def test_gate(tensor_operations, kind, clamp):
    logits = torch.randn(5, 7) * 15
    logits[1, 2], logits[2, 0], logits[3, 1] = torch.inf, -torch.inf, torch.nan

    @torch.no_grad()
    def run():
        return gate(logits, logit_clamp=clamp, kind=kind)

    for actual, expected in zip(run(), tensor_operations(run), strict=True):
        torch.testing.assert_close(actual, expected, rtol=2e-6, atol=1e-12, equal_nan=True)
    assert run().coefficients[1:4].isnan().all()


def test_an_index_out_of_range_is_an_error():
    x, u = torch.randn(1, 4), torch.randn(3, 4)
    with torch.no_grad(), pytest.raises(IndexError, match="number of atoms"):
        compose(x, u, u, torch.tensor([[3]]), torch.ones(1, 1), impl="gather")


def test_only_plain_contiguous_cpu_tensors_are_taken():
    x = torch.randn(4, 4)
    assert native.module_for(x) is not None
    assert native.module_for(x.t()) is None
    assert native.module_for(x.double()) is None
    assert native.module_for(x.to("meta")) is None
