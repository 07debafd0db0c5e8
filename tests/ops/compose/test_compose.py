"""The ladder of the composition: literal loop, gradcheck, implementations, odd shapes, operator contract, errors."""

import importlib.util

import pytest
import torch
import torch._dynamo.testing
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import library

from torchdsc.ops import compose
from torchdsc.ops.compose import IMPLEMENTATIONS

from .ladder import TOLERANCE, assert_agree, device_of, drawn, make_inputs, output_and_gradients

AVAILABLE = ("reference", "gather", "dense", "triton", "auto")
# tokens, atoms, top_k, d_in, d_out: none, one, K = 1, K = M, no powers of two, few pairs and many.
SHAPES = [(0, 5, 2, 3, 4), (1, 7, 7, 5, 3), (63, 20, 1, 12, 9), (100, 30, 30, 17, 17), (300, 50, 4, 33, 20)]
# The same for kernels that may be interpreted, a hundredth of a second a program: also pairs fewer than atoms.
FEW_SHAPES = [(0, 5, 2, 3, 4), (1, 7, 7, 5, 3), (13, 9, 1, 12, 9), (5, 19, 19, 17, 17), (5, 19, 3, 33, 20)]
TRITON = pytest.param("triton", marks=pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="needs triton"))
LADDER = [TRITON if impl == "triton" else impl for impl in AVAILABLE]
OPTIMISED = ["gather", "dense", TRITON]


def few(impl, size, smaller):
    """``size``, or a smaller one where the kernels may be interpreted."""
    return smaller if impl == "triton" else size


def literal_loop(x, u, v, indices, coefficients, eps):
    """Equations (3) and (14), token by token and atom by atom."""
    rows = []
    for t in range(x.shape[0]):
        row = x.new_zeros(v.shape[1])
        for k in range(indices.shape[1]):
            j = indices[t, k]
            u_j = u[j] / u[j].norm().clamp_min(eps) if eps is not None else u[j]
            v_j = v[j] / v[j].norm().clamp_min(eps) if eps is not None else v[j]
            row = row + coefficients[t, k] * (x[t] @ u_j) * v_j
        rows.append(row)
    return torch.stack(rows) if rows else x.new_zeros(0, v.shape[1])


@pytest.mark.parametrize("eps", [1e-6, None, 4.0], ids=["unit", "raw", "under-eps"])
@pytest.mark.parametrize("case", range(len(SHAPES)))
@pytest.mark.parametrize("impl", LADDER)
def test_equals_literal_loop_in_float64(impl, case, eps):
    shape = few(impl, SHAPES, FEW_SHAPES)[case]
    inputs = make_inputs(*shape, impl=impl)
    expected = output_and_gradients(lambda *a: literal_loop(*a, eps), inputs) if shape[0] else None
    actual = output_and_gradients(lambda *a: compose(*a, eps=eps, impl=impl), inputs)
    assert actual[0].shape == (shape[0], shape[4])
    if expected is None:
        assert all(not t.any() for t in actual)
        return
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", range(1, len(SHAPES)))
@pytest.mark.parametrize("impl", LADDER)
def test_low_precision_against_float64(impl, case, dtype):
    low = make_inputs(*few(impl, SHAPES, FEW_SHAPES)[case], dtype=dtype, impl=impl)
    precise = [t.detach().double().requires_grad_() if t.is_floating_point() else t for t in low]
    expected = output_and_gradients(lambda *a: compose(*a, impl="reference"), precise)
    actual = output_and_gradients(lambda *a: compose(*a, impl=impl), low)
    assert actual[0].dtype == dtype
    for a, e in zip(actual, expected, strict=True):
        assert (a.double() - e).abs().max() <= TOLERANCE[dtype] * e.abs().max()


@pytest.mark.parametrize("impl", ["reference", *OPTIMISED])
def test_gradcheck(impl):
    x, u, v, indices, coefficients = make_inputs(*few(impl, (5, 6, 3, 4, 3), (2, 3, 2, 3, 2)), impl=impl)
    assert torch.autograd.gradcheck(
        lambda x, u, v, c: compose(x, u, v, indices, c, impl=impl), (x, u, v, coefficients), eps=1e-6, atol=1e-7
    )


@pytest.mark.parametrize("impl", OPTIMISED)
def test_strides_and_leading_dimensions(impl):
    tokens = few(impl, 60, 12)
    inputs = x, u, v, indices, coefficients = make_inputs(tokens, 20, 3, 12, 9, impl=impl)
    expected = output_and_gradients(lambda *a: compose(*a, impl="reference"), inputs)

    def strided(x, u, v, indices, coefficients):
        x, coefficients = torch.stack([x, x], 2)[..., 0], coefficients.expand(2, -1, -1).permute(1, 2, 0)[..., 1]
        u, v, indices = u.t().contiguous().t(), torch.cat([v, v], 1)[:, : v.shape[1]], indices.t().contiguous().t()
        return compose(x, u, v, indices, coefficients, impl=impl).t().contiguous().t()

    for a, e in zip(output_and_gradients(strided, inputs), expected, strict=True):
        torch.testing.assert_close(a, e)
    leading = 2, tokens // 4, 2, -1
    shaped = compose(x.view(leading), u, v, indices.view(leading), coefficients.view(leading), impl=impl)
    torch.testing.assert_close(shaped.view(tokens, -1), expected[0])


@pytest.mark.parametrize("impl", OPTIMISED)
def test_a_bad_token_spoils_only_its_own_row(impl):
    tokens = few(impl, 200, 12)
    x, u, v, indices, coefficients = (t.detach() for t in make_inputs(tokens, 20, 3, 12, 9, impl=impl))
    coefficients[7] = torch.nan
    x[3, 5] = torch.nan
    y = compose(x, u, v, indices, coefficients, impl=impl)
    assert y[[3, 7]].isnan().all()
    assert y[[t for t in range(tokens) if t not in (3, 7)]].isfinite().all()


@pytest.mark.parametrize("impl", ["auto", TRITON])
def test_atoms_without_a_token_get_a_zero_gradient(impl):
    x, u, v, indices, coefficients = make_inputs(few(impl, 90, 20), 20, 3, 12, 9, impl=impl)
    indices = indices.clamp_max(10)
    compose(x, u, v, indices, coefficients, impl=impl).sum().backward()
    assert not u.grad[11:].any()
    assert not v.grad[11:].any()
    assert u.grad[:11].any(1).all()


@pytest.mark.parametrize("tokens", [2, 40])
@pytest.mark.parametrize("impl", LADDER)
def test_opcheck(impl, tokens):
    inputs = make_inputs(few(impl, tokens, min(tokens, 4)), few(impl, 9, 5), 3, 5, 4, impl=impl)
    library.opcheck(torch.ops.torchdsc.compose.default, (*inputs, 1e-6, impl))


@pytest.mark.parametrize("tokens", [0, 2, 40])
@pytest.mark.parametrize("impl", ["auto", "reference", "gather", "dense"])
def test_opcheck_of_any_strides(impl, tokens):
    """A compiled graph is told that results are contiguous."""
    inputs = make_inputs(tokens, 9, 3, 5, 4, impl=impl)
    inputs = [t.detach().t().contiguous().t().requires_grad_(t.requires_grad) for t in inputs]
    library.opcheck(torch.ops.torchdsc.compose.default, (*inputs, 1e-6, impl))


@pytest.mark.slow
def test_compile_does_not_recompile_for_batch_sizes():
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lambda *a: compose(*a), fullgraph=True, backend=counter, dynamic=True)
    graphs = []
    for tokens in (11, 40, 77, 300):
        inputs = make_inputs(tokens, 20, 3, 12, 9)
        expected = output_and_gradients(compose, inputs)
        for a, e in zip(output_and_gradients(compiled, inputs), expected, strict=True):
            torch.testing.assert_close(a, e)
        graphs.append(counter.frame_count)
    assert len(set(graphs)) == 1


def test_export():
    class Module(torch.nn.Module):
        def forward(self, x, u, v, indices, coefficients):
            return compose(x, u, v, indices, coefficients)

    inputs = tuple(t.detach() for t in make_inputs(9, 20, 3, 12, 9))
    tokens = torch.export.Dim("tokens", min=2)
    dynamic = ({0: tokens}, None, None, {0: tokens}, {0: tokens})
    program = torch.export.export(Module(), inputs, dynamic_shapes=dynamic)
    larger = tuple(t.detach() for t in make_inputs(50, 20, 3, 12, 9))
    torch.testing.assert_close(program.module()(*larger), compose(*larger))


@pytest.mark.parametrize("impl", ["reference", *OPTIMISED])
def test_autocast_changes_nothing(impl):
    inputs = make_inputs(few(impl, 100, 5), few(impl, 30, 6), 4, 16, 16, dtype=torch.float32, impl=impl)
    expected = output_and_gradients(lambda *a: compose(*a, impl=impl), inputs)
    with torch.autocast(device_of(impl), dtype=torch.bfloat16):
        actual = output_and_gradients(lambda *a: compose(*a, impl=impl), inputs)
        assert torch.equal(compose(*(t.detach() for t in inputs), impl=impl), expected[0])
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))


@pytest.mark.parametrize("impl", ["gather", TRITON])
def test_deterministic(impl):
    inputs = make_inputs(few(impl, 500, 15), few(impl, 30, 3), 4, 16, 16, dtype=torch.float32, impl=impl)
    first = output_and_gradients(lambda *a: compose(*a, impl=impl), inputs)
    second = output_and_gradients(lambda *a: compose(*a, impl=impl), inputs)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(**drawn(70, 40))
def test_property_implementations_agree(**arguments):
    inputs = make_inputs(**arguments)
    expected = output_and_gradients(lambda *a: compose(*a, impl="reference"), inputs)
    for impl in ("gather", "dense"):
        assert_agree(
            output_and_gradients(lambda *tensors, i=impl: compose(*tensors, impl=i), inputs),
            expected,
            inputs[1],
        )


@pytest.mark.slow
@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**31), atoms=st.integers(2, 40))
def test_property_permuting_atoms_changes_nothing(seed, atoms):
    x, u, v, indices, coefficients = make_inputs(20, atoms, 3, 8, 8, seed=seed)
    permutation = torch.randperm(atoms, generator=torch.Generator().manual_seed(seed))
    inverse = permutation.argsort()
    y = compose(x, u, v, indices, coefficients)
    permuted = compose(x, u[permutation], v[permutation], inverse[indices], coefficients)
    torch.testing.assert_close(permuted, y, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"x": torch.zeros(6, 5)}, ValueError, r"x must have shape .* got \(6, 5\)"),
        ({"u": torch.zeros(20)}, ValueError, r"u \(M, d_in\)"),
        ({"v": torch.zeros(19, 9)}, ValueError, r"v must have shape .* got \(19, 9\)"),
        ({"indices": torch.zeros(5, 3, dtype=torch.int64)}, ValueError, r"indices must have shape .* got \(5, 3\)"),
        ({"indices": torch.zeros(6, 0, dtype=torch.int64)}, ValueError, "K >= 1"),
        ({"indices": torch.zeros(6, 3, dtype=torch.int32)}, ValueError, "indices must be int64"),
        ({"coefficients": torch.zeros(6, 2)}, ValueError, "coefficients must have the shape of indices"),
        ({"x": torch.zeros(6, 12, dtype=torch.float64)}, TypeError, "one floating dtype"),
        ({"eps": 0.0}, ValueError, "eps must be > 0"),
        ({"impl": "fast"}, ValueError, "impl must be one of"),
    ],
)
def test_errors(change, error, match):
    x, u, v, indices, coefficients = (t.detach() for t in make_inputs(6, 20, 3, 12, 9, dtype=torch.float32))
    arguments = {"x": x, "u": u, "v": v, "indices": indices, "coefficients": coefficients} | change
    with pytest.raises(error, match=match):
        compose(**arguments)


def test_every_implementation_is_listed():
    assert set(AVAILABLE) - {"auto"} == set(IMPLEMENTATIONS)
