"""What the ladder's shapes leave out of the Triton kernels: several blocks, hot atoms, a GPU, no triton at all."""

import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings

from torchdsc.ops import compose
from torchdsc.ops.compose import triton as implementation

from . import ladder

pytest.importorskip("triton")


def make_inputs(*sizes, **options):
    return ladder.make_inputs(*sizes, **options, impl="triton")


def output_and_gradients(inputs, impl, eps=1e-6):
    return ladder.output_and_gradients(lambda *a: compose(*a, eps=eps, impl=impl), inputs)


def assert_equals_reference(inputs, tolerance, eps=1e-6):
    precise = [t.detach().double().requires_grad_() if t.is_floating_point() else t for t in inputs]
    expected = output_and_gradients(precise, "reference", eps)
    for a, e in zip(output_and_gradients(inputs, "triton", eps), expected, strict=True):
        assert (a.double() - e).abs().max() <= tolerance * e.abs().max().clamp_min(1e-30)


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks so small that every loop of the kernels runs more than once at sizes an interpreter can bear."""
    for name, value in {"_TILE": 32, "_BLOCK_K": 2, "_BLOCK_P": 4, "_CELL": 8}.items():
        monkeypatch.setattr(implementation, name, value)


@pytest.mark.parametrize("eps", [1e-6, None, 3.3], ids=["unit", "raw", "around-eps"])
@pytest.mark.parametrize("shape", [(12, 3, 5, 9, 11), (3, 16, 5, 9, 18)], ids=["bank-norms", "row-norms"])
def test_several_blocks_of_everything(small_blocks, shape, eps):
    assert_equals_reference(make_inputs(*shape), 1e-14, eps)


@pytest.mark.parametrize("pairs", [[0] * 40, [0] * 7 + [1] * 25 + [2] * 8, [0] * 8 + [1] * 8 + [2] * 16 + [4] * 8])
def test_hot_atoms(small_blocks, pairs):
    x, u, v, _, coefficients = make_inputs(20, 5, 2, 6, 7)
    # Scattered over the tokens: sorting has to bring the pairs of an atom together.
    shuffled = torch.tensor(pairs)[torch.randperm(40)].view(20, 2).to(x.device)
    inputs = x, u, v, shuffled, coefficients
    assert_equals_reference(inputs, 1e-14)
    first, second = output_and_gradients(inputs, "triton"), output_and_gradients(inputs, "triton")
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")
@pytest.mark.parametrize("top_k", [3, 20])
def test_lanes_beyond_the_selection_add_nothing(top_k):
    # Infinities, of the token and of its output's gradient, that come to NaN if anything is multiplied by 0.
    x, u, v, indices, coefficients = (t.detach() for t in make_inputs(2, 30, top_k, 4, 4))
    x[0, 0] = torch.inf
    x.requires_grad_()
    y = compose(x, u.abs() + 0.1, v.abs() + 0.1, indices, coefficients + 0.1, impl="triton")
    assert (y[0] == torch.inf).all()
    assert y[1].isfinite().all()
    grad = torch.ones_like(y)
    grad[0, 0] = torch.inf
    (dx,) = torch.autograd.grad(y, x, grad)
    assert (dx[0] == torch.inf).all()
    assert dx[1].isfinite().all()


def test_no_features():
    for d_in, d_out in ((0, 3), (3, 0)):
        y, *gradients = output_and_gradients(make_inputs(3, 4, 2, d_in, d_out), "triton")
        assert y.shape == (3, d_out)
        assert not any(t.any() for t in (y, *gradients))


@pytest.mark.slow
@settings(max_examples=12, deadline=None)
@given(**ladder.drawn(4, 6))
def test_property_equals_reference(**arguments):
    inputs = make_inputs(**arguments)
    results = (output_and_gradients(inputs, impl) for impl in ("triton", "reference"))
    ladder.assert_agree(*results, inputs[1])


CALL = """
import torch, torchdsc
from torchdsc.ops import compose
inputs = torch.randn(9, 4), torch.randn(5, 4), torch.randn(5, 3), torch.randint(5, (9, 2)), torch.rand(9, 2)
compose(*inputs)
layer = torchdsc.DSC(4, num_atoms=5, top_k=2)
(layer(inputs[0]).sum() + torchdsc.regularization(layer).total).backward()
for no_grad in (True, False):
    with torch.set_grad_enabled(not no_grad):
        try:
            compose(*inputs, impl="triton")
        except Exception as error:
            print(type(error).__name__, "|", error)
"""


def run(code, **environment):
    kept = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=200, env=kept | environment
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_without_triton_all_else_works():
    lines = run("import sys; sys.modules['triton'] = None" + CALL)
    assert len(lines) == 2
    assert all(line.startswith("ImportError | impl='triton' needs triton: pip install") for line in lines)


def test_with_a_broken_triton_all_else_works(tmp_path):
    (tmp_path / "triton.py").write_text("raise ImportError('libcuda is of another age')")
    lines = run(f"import sys; sys.path.insert(0, {str(tmp_path)!r})" + CALL)
    assert len(lines) == 2
    assert all(line.startswith("ImportError | impl='triton' needs triton") for line in lines)
    assert all("another age" in line for line in lines)


def test_tensors_on_the_cpu_are_refused_unless_interpreted():
    lines = run(CALL)
    assert len(lines) == 2
    assert all(line.startswith("RuntimeError | impl='triton' runs on a GPU") for line in lines)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ladder.TOLERANCE)
@pytest.mark.parametrize(
    "shape",
    [
        (1, 1523, 4, 384, 384),
        (300, 50, 4, 33, 20),
        (2048, 1523, 4, 384, 384),
        (500, 97, 97, 130, 1000),
        (4096, 3, 2, 100, 100),
        (64, 4096, 33, 1030, 5),
    ],
    ids=str,
)
def test_on_a_gpu(shape, dtype):
    assert_equals_reference(make_inputs(*shape, dtype=dtype), ladder.TOLERANCE[dtype])


@pytest.mark.gpu
def test_on_a_gpu_deterministic():
    inputs = make_inputs(5000, 30, 8, 384, 256, dtype=torch.float32)
    first = output_and_gradients(inputs, "triton")
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(output_and_gradients(inputs, "triton"), first, strict=True))


@pytest.mark.gpu
def test_on_a_gpu_offsets_beyond_int32():
    atoms, width = 2**20 + 5, 2056
    if torch.cuda.mem_get_info()[0] < 40 * 2**30:
        pytest.skip("needs 40 GiB of GPU memory")
    u, v = (torch.randn(atoms, w, device="cuda", dtype=torch.bfloat16, requires_grad=True) for w in (width, 8))
    x = torch.randn(3, width, device="cuda", dtype=torch.bfloat16)
    indices = torch.tensor([[atoms - 1, 0], [atoms - 2, atoms - 1], [1, atoms - 3]], device="cuda")
    coefficients = torch.rand(3, 2, device="cuda")
    y = compose(x, u, v, indices, coefficients, impl="triton")
    y.sum().backward()
    chosen, places = indices.unique(return_inverse=True)
    small_u, small_v = (t.detach()[chosen].requires_grad_() for t in (u, v))
    expected = compose(x, small_u, small_v, places, coefficients, impl="reference")
    expected.sum().backward()
    torch.testing.assert_close(y, expected, rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(u.grad[chosen], small_u.grad, rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(v.grad[chosen], small_v.grad, rtol=2e-2, atol=2e-2)
