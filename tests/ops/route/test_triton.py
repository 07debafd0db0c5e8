"""The fused selection against ``ops.select`` on logits of float64 precision."""

import pytest
import torch

from torchdsc.ops.route import triton as implementation
from torchdsc.ops.select import _select_op

pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# tokens, atoms, width, top_k: one of each, K = M, K = 64, several blocks of all, exact blocks, no powers of two.
SHAPES = [(1, 1, 1, 1), (5, 9, 3, 9), (40, 130, 70, 64), (67, 70, 131, 4), (32, 64, 64, 1), (17, 65, 1, 3)]


def make_inputs(tokens, atoms, width, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, width, generator=generator, dtype=torch.float64)
    weight = torch.randn(atoms, width, generator=generator, dtype=torch.float64)
    bias = torch.randn(atoms, generator=generator, dtype=torch.float64)
    weights = (torch.rand(tokens, generator=generator) > 0.3).float()
    return x.to(DEVICE, dtype), weight.to(DEVICE, dtype), bias.to(DEVICE, dtype), weights.to(DEVICE)


def precise_logits(x, weight, bias):
    logits = x.double() @ weight.double().t()
    return logits if bias is None else logits + bias.double()


def assert_selects(x, weight, bias, weights, top_k, logit_clamp):
    values, indices, log_normalizer, probability_sum = implementation.forward(
        x, weight, bias, weights, top_k, logit_clamp, True
    )
    logits = precise_logits(x, weight, bias)
    expected = _select_op(logits, None if weights is None else weights.double(), top_k, logit_clamp)
    # Rounding of products that are summed in float32, and of the statistics' exponentials.
    bound = x.double().abs() @ weight.double().abs().t()
    rounding = 4e-7 * (1 + (bound if bias is None else bound + bias.double().abs()).max().item())
    assert [t.dtype for t in (values, indices, log_normalizer, probability_sum)] == [
        torch.float32, torch.int64, torch.float32, torch.float32,
    ]  # fmt: skip
    assert indices.sort(1).values.diff(dim=1).gt(0).all()
    torch.testing.assert_close(values.double(), expected[0], rtol=0, atol=rounding)
    torch.testing.assert_close(logits.gather(1, indices), expected[0], rtol=0, atol=rounding)
    torch.testing.assert_close(log_normalizer.double(), expected[2], rtol=0, atol=rounding)
    torch.testing.assert_close(probability_sum.double(), expected[3], rtol=2 * rounding, atol=rounding * 1e-2)
    assert values.diff(dim=1).le(0).all()


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("logit_clamp", [20.0, 0.7])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_selection_of_precise_logits(shape, logit_clamp, masked):
    tokens, atoms, width, top_k = shape
    x, weight, bias, weights = make_inputs(tokens, atoms, width)
    assert_selects(x, weight, bias if masked else None, weights if masked else None, top_k, logit_clamp)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(40, 70, 150, 5), (3, 7, 5, 2)], ids=str)
def test_other_dtypes_accumulate_in_float32(shape, dtype):
    tokens, atoms, width, top_k = shape
    x, weight, bias, weights = make_inputs(tokens, atoms, width, dtype)
    assert_selects(x, weight, bias, weights, top_k, 5.0)
    if dtype != torch.float64:
        assert_selects(x, weight.float(), bias.float(), weights, top_k, 5.0)


@pytest.mark.parametrize("name", ["x", "weight", "bias", "weights"])
def test_strides(name):
    inputs = dict(zip(("x", "weight", "bias", "weights"), make_inputs(37, 70, 20), strict=True))
    tensor = inputs[name]
    strided = tensor.t().contiguous().t() if tensor.dim() == 2 else torch.stack([tensor, -tensor], 1)[:, 0]
    assert strided.stride() != tensor.stride()
    expected = implementation.forward(**inputs, top_k=4, logit_clamp=2.0, need_statistics=True)
    actual = implementation.forward(**(inputs | {name: strided}), top_k=4, logit_clamp=2.0, need_statistics=True)
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))


def test_without_statistics_the_selection_is_the_same():
    inputs = make_inputs(40, 70, 20)
    expected = implementation.forward(*inputs, 4, 2.0, True)
    actual = implementation.forward(*inputs, 4, 2.0, False)
    assert all(torch.equal(a, e) for a, e in zip(actual[:2], expected[:2], strict=True))
    assert [t.numel() for t in actual[2:]] == [0, 0]


@pytest.mark.parametrize("need_statistics", [False, True])
def test_no_tokens(need_statistics):
    x, weight, bias, weights = make_inputs(0, 7, 5)
    shapes = [tuple(t.shape) for t in implementation.forward(x, weight, bias, weights, 3, 2.0, need_statistics)]
    assert shapes == [(0, 3), (0, 3), (0,), (7,) if need_statistics else (0,)]


@pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")
def test_a_bad_token_spoils_only_its_own_row():
    x, weight, bias, _ = make_inputs(40, 70, 20)
    x[7, 3] = torch.nan
    values, indices, log_normalizer, probability_sum = implementation.forward(x, weight, bias, None, 4, 20.0, True)
    assert values[7].isnan().all()
    assert indices[7].unique().numel() == 4
    assert log_normalizer[7].isnan()
    # In its place another: a product may round a row otherwise at another place of a block.
    good = torch.arange(40) != 7
    x[7, 3] = 0.0
    expected = implementation.forward(x, weight, bias, None, 4, 20.0, True)
    assert all(torch.equal(a[good], e[good]) for a, e in zip((values, indices, log_normalizer), expected, strict=False))
    assert probability_sum.isnan().all()


@pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")
@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("place", [0, 66])
def test_not_finite_logits(place, sign):
    # The logits are the bias. In the order of topk: NaN, then infinity, zeros of either sign, negative infinity last.
    bias = torch.linspace(-9, -1, 70)
    # A NaN has a sign, which says nothing of its place: processors make negative ones.
    nan = torch.tensor(torch.nan).copysign(torch.tensor(sign)).item()
    bias[[place, 20, 21, 22, 23]] = torch.tensor([nan, torch.inf, 0.0, -0.0, -torch.inf])
    x, weight = torch.zeros(3, 5, device=DEVICE), torch.zeros(70, 5, device=DEVICE)
    values, indices, *_ = implementation.forward(x, weight, bias.to(DEVICE), None, 5, 20.0, False)
    assert indices[:, :2].tolist() == [[place, 20]] * 3
    assert set(indices[0, 2:4].tolist()) == {21, 22}
    assert values[:, 0].isnan().all()
    assert values[0, 1:].tolist() == [torch.inf, 0.0, 0.0, -1.0]
    bias[place] = 0.0
    all_of_them = implementation.forward(x[:, :1], weight[:64, :1], bias[:64].to(DEVICE), None, 64, 20.0, True)
    assert all_of_them[1][0, -1] == 23
    assert all_of_them[0][0, -1] == -torch.inf
    expected = bias[:64].clamp(-20, 20).logsumexp(0).expand(3).to(DEVICE)
    torch.testing.assert_close(all_of_them[2], expected)


def test_equal_logits_are_selected_once_each():
    x, weight = torch.ones(20, 4, device=DEVICE), torch.ones(70, 4, device=DEVICE)
    values, indices, _, probability_sum = implementation.forward(x, weight, None, None, 10, 20.0, True)
    assert indices.tolist() == [list(range(10))] * 20
    assert (values == 4.0).all()
    torch.testing.assert_close(probability_sum, torch.full((70,), 20 / 70, device=DEVICE))


def test_many_tokens_share_the_rows_of_partial_sums(monkeypatch):
    monkeypatch.setattr(implementation, "_ROWS", 2)
    x, weight, bias, weights = make_inputs(140, 20, 6)
    assert_selects(x, weight, bias, weights, 3, 2.0)
    first, second = (implementation.forward(x, weight, bias, weights, 3, 2.0, True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize(("atoms", "top_k"), [(11, 0), (11, 12), (100, 65)])
def test_top_k_out_of_range(atoms, top_k):
    x, weight, bias, _ = make_inputs(3, atoms, 4)
    with pytest.raises(ValueError, match=rf"top_k must be in \[1, min\(num_atoms = {atoms}, 64\)\].*got {top_k}"):
        implementation.forward(x, weight, bias, None, top_k, 20.0, True)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize(
    "shape", [(4096, 1523, 384, 4), (1, 1523, 384, 8), (1000, 10007, 96, 64), (777, 64, 1030, 64)], ids=str
)
def test_on_a_gpu(shape, dtype):
    tokens, atoms, width, top_k = shape
    x, weight, bias, weights = make_inputs(tokens, atoms, width, dtype)
    # Logits of a few units, as a router's are.
    assert_selects(x * width**-0.5, weight, bias, weights, top_k, 3.0)
