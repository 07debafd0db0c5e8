"""The compiled functions against the tensor operations that stand in for them."""

import os
import subprocess
import sys

import pytest
import torch

from torchdsc.ops import compose, gate, native
from torchdsc.ops.select import largest, select_backward, select_forward

pytestmark = pytest.mark.skipif(native._native is None, reason="the optional compiled part was not built")

CAPABILITIES = {"_native_avx512": "AVX512", "_native_avx2": "AVX2", "_native": "DEFAULT"}
# What this processor can run, from the build that is taken on.
BUILDS = [] if native._native is None else list(CAPABILITIES)
BUILDS = BUILDS[BUILDS.index(native._native.__name__.rpartition(".")[2]) :] if BUILDS else []


@pytest.fixture(autouse=True, params=BUILDS)
def build(request, monkeypatch):
    """Every test, with every build."""
    monkeypatch.setattr(native, "_native", pytest.importorskip(f"torchdsc.ops.{request.param}"))


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


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("eps", [1e-6, None, 4.0])
@pytest.mark.parametrize(
    ("tokens", "atoms", "top_k", "d_in", "d_out"),
    [(70, 50, 4, 384, 96), (7, 9, 9, 5, 33), (3, 3, 1, 16, 1), (64, 2, 5, 3, 17)],
)
def test_compose_backward(tensor_operations, tokens, atoms, top_k, d_in, d_out, eps, threads, monkeypatch):
    # Some rows below eps = 4, and an atom that nothing selects.
    x, u, v = torch.randn(tokens, d_in), torch.randn(atoms, d_in), torch.randn(atoms, d_out)
    u[0] *= 1e-3
    indices, coefficients = torch.randint(max(1, atoms - 1), (tokens, top_k)), torch.rand(tokens, top_k)
    weight = torch.randn(tokens, d_out)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)

    def run(impl="gather", dtype=torch.float32):
        inputs = [t.to(dtype).requires_grad_() for t in (x, u, v, coefficients)]
        y = compose(*inputs[:3], indices, inputs[3], eps=eps, impl=impl)
        return torch.autograd.grad(y, inputs, weight.to(dtype))

    expected = run("reference", torch.float64)
    # Gradients of rows cancel from parts of the size of one over the norm.
    sizes = 1.0, u.norm(dim=1, keepdim=True), v.norm(dim=1, keepdim=True), 1.0
    for found in (run(), tensor_operations(run)):
        for actual, exact, size in zip(found, expected, sizes, strict=True):
            assert ((actual.double() - exact) * size).abs().max() <= 2e-6 * (exact * size).abs().max().clamp_min(1.0)
    assert run()[1][-1].abs().max() == 0.0


def test_compose_backward_takes_an_expanded_gradient(tensor_operations):
    u = torch.randn(3, 4, requires_grad=True)
    x, indices, coefficients = torch.randn(6, 4), torch.randint(3, (6, 2)), torch.rand(6, 2)

    def run():
        return torch.autograd.grad(compose(x, u, u, indices, coefficients, impl="gather").sum(), u)

    torch.testing.assert_close(run(), tensor_operations(run))


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


@pytest.mark.parametrize("top_k", [1, 4, 5, 7, 8, 16, 17, 32, 33, 64])
@pytest.mark.parametrize("atoms", [64, 100, 128, 191, 575, 1523])
def test_largest(tensor_operations, top_k, atoms):
    logits = torch.randn(50, atoms)
    logits[3] = 1.0
    logits[4, :70], logits[5, 7], logits[6, 9], logits[7] = torch.inf, torch.nan, -torch.inf, -torch.inf
    logits[8] = logits[8].round()
    # Fewer than K that are more than the least there is.
    logits[9], logits[9, -1], logits[10, ::3] = -torch.inf, 0.0, torch.nan
    # Many at once above any bar, in rising order: the room for candidates runs out.
    logits[13], logits[14] = torch.arange(atoms), torch.arange(atoms) % 3
    # Differences that overflow, and values that lie close beside one far away.
    logits[11] *= 1e38
    logits[12, 1:], logits[12, 0] = torch.rand(atoms - 1) * 1e-6, 1e6
    values, indices = largest(logits, top_k)
    expected = tensor_operations(lambda: largest(logits, top_k))[0]
    assert torch.equal(values.nan_to_num(nan=5e5), expected.nan_to_num(nan=5e5))
    assert torch.equal(logits.gather(1, indices).nan_to_num(nan=5e5), values.nan_to_num(nan=5e5))
    assert all(len(set(row)) == top_k for row in indices.tolist())


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize(("tokens", "atoms", "top_k"), [(300, 1523, 4), (1, 64, 64), (5, 1, 1), (65, 130, 20)])
@pytest.mark.parametrize("clamp", [20.0, 1.0])
@pytest.mark.parametrize("masked", [False, True])
def test_select(tensor_operations, threads, tokens, atoms, top_k, clamp, masked):
    logits = torch.randn(tokens, atoms) * 3
    weights = (torch.rand(tokens) > 0.4).float() if masked else None
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = select_forward(logits, weights, top_k, clamp)
        gradients = torch.randn(tokens, top_k), torch.randn(tokens), torch.randn(atoms)
        grad = select_backward(logits, weights, *found[1:3], *gradients, clamp)
    finally:
        torch.set_num_threads(before)
    double = [None if t is None else t.double() for t in (logits, weights)]
    precise = select_forward(*double, top_k, clamp)
    expected = select_backward(*double, *precise[1:3], *(g.double() for g in gradients), clamp)
    assert torch.equal(found[1], precise[1])
    for actual, exact in ((found[0], precise[0]), (found[2], precise[2]), (found[3], precise[3]), (grad, expected)):
        torch.testing.assert_close(actual.double(), exact, rtol=3e-6, atol=3e-6)


def test_select_extremes(tensor_operations):
    """Far below the largest, beyond any clamp, and rows that are not finite."""
    logits = torch.zeros(5, 200)
    logits[0, 0], logits[1], logits[2, 5], logits[3, 1], logits[4, 1] = 300.0, -300.0, torch.nan, torch.inf, -torch.inf
    for clamp in (20.0, 1e4):
        found, expected = (
            select_forward(logits, None, 2, clamp),
            tensor_operations(lambda clamp=clamp: select_forward(logits, None, 2, clamp)),
        )
        torch.testing.assert_close(found[2], expected[2], equal_nan=True)
        assert found[2][2].isnan()
        assert found[2][[0, 1, 4]].isfinite().all()


@pytest.mark.parametrize("top_k", [0, native.MOST_SELECTED + 1])
def test_more_than_can_be_selected_is_an_error(top_k):
    logits = torch.randn(1, 100)
    values, indices = torch.empty(1, 100), torch.empty(1, 100, dtype=torch.int64)
    module = native.module_for(logits)
    sizes = {"tokens": 1, "num_atoms": 100, "top_k": top_k, "stride": 100, "threads": 1}
    with pytest.raises(ValueError, match=f"top_k must be in .* got {top_k}"):
        module.largest_of_rows(logits=logits, values=values, indices=indices, **sizes)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda given: dict(reversed(given.items())), TypeError, "argument 1 must be logits, got threads"),
        (lambda given: {**given, "values": None}, TypeError, "values must be a tensor, got .*NoneType"),
        (lambda given: {**given, "tokens": 1.5}, TypeError, "float"),
        (lambda given: {**given, "more": 1}, TypeError, "must be 8 by name, got 9 by name and 0 by place"),
        (lambda given: {**given, "tokens": 1 << 64}, OverflowError, "int"),
    ],
)
def test_arguments_that_do_not_fit_the_struct(change, error, message):
    logits, values, indices = torch.randn(1, 100), torch.empty(1, 4), torch.empty(1, 4, dtype=torch.int64)
    sizes = {"tokens": 1, "num_atoms": 100, "top_k": 4, "stride": 100, "threads": 1}
    given = {"logits": logits, "values": values, "indices": indices, **sizes}
    module = native.module_for(logits)
    module.largest_of_rows(**given)
    assert torch.equal(values, logits.topk(4)[0])
    with pytest.raises(error, match=message):
        module.largest_of_rows(**change(given))
    with pytest.raises(TypeError, match="must be 8 by name, got 0 by name and 8 by place"):
        module.largest_of_rows(*given.values())


@pytest.mark.parametrize("name", BUILDS)
def test_the_build_is_the_one_for_the_instructions_that_torch_uses(name):
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": CAPABILITIES[name].lower()}
    code = "from torchdsc.ops import native; print(native._native.__name__)"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == f"torchdsc.ops.{name}"


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
