"""Product and selection in one, against the same from logits that are kept: values, gradients, memory, errors."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import library
from torch.nn import functional

from torchdsc.ops import native, route, select
from torchdsc.ops.route import api, contract, screened

needs_bfloat16 = pytest.mark.skipif(
    not native.has_bfloat16(), reason="the compiled part was not built, or the processor multiplies no bfloat16"
)


@pytest.fixture
def recomputing(monkeypatch):
    """No logits are kept, and few are in memory at a time."""
    monkeypatch.setattr(api, "KEPT_BYTES", 0)
    monkeypatch.setattr(api, "_FEW_BYTES", 0)
    few_at_a_time(monkeypatch)


def few_at_a_time(monkeypatch):
    monkeypatch.setattr(contract, "_CHUNK_BYTES", {"cpu": 1, "other": 1})
    monkeypatch.setattr(contract, "_CHUNK_TOKENS", 16)


def inputs(tokens=50, width=12, atoms=40, bias=True, dtype=torch.float64):
    x = torch.randn(tokens, width, dtype=dtype)
    weight = torch.randn(atoms, width, dtype=dtype)
    return [t.requires_grad_() for t in (x, weight, *([torch.randn(atoms, dtype=dtype)] if bias else []))]


@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("tokens", [0, 1, 16, 50])
@pytest.mark.parametrize("top_k", [1, 5, 40])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("logit_clamp", [20.0, 1.5])
def test_chunks_change_nothing(monkeypatch, kept, tokens, top_k, bias, masked, logit_clamp):
    few_at_a_time(monkeypatch)
    if not kept:
        monkeypatch.setattr(api, "KEPT_BYTES", 0)
    leaves = inputs(tokens, bias=bias)
    mask = torch.rand(tokens) > 0.4 if masked else None
    settings = {"logit_clamp": logit_clamp, "token_mask": mask}
    expected = select(functional.linear(*leaves), top_k, **settings)
    actual = route(*leaves, top_k=top_k, statistics=True, **settings)
    assert torch.equal(actual.indices, expected.indices)
    gradients = []
    weights = [torch.randn_like(t) if t.is_floating_point() else None for t in expected]
    for selection in (expected, actual):
        loss = sum((o * w).sum() for o, w in zip(selection, weights, strict=True) if w is not None)
        gradients.append(torch.autograd.grad(loss, leaves))
    for i in (0, 2, 3):
        torch.testing.assert_close(actual[i], expected[i], rtol=1e-12, atol=1e-13)
    for a, e in zip(*reversed(gradients), strict=True):
        torch.testing.assert_close(a, e, rtol=1e-11, atol=1e-12)


@pytest.mark.usefixtures("recomputing")
@pytest.mark.parametrize("bias", [False, True])
def test_without_statistics(bias):
    leaves = inputs(bias=bias)
    actual = route(*leaves, top_k=3)
    values, indices = functional.linear(*leaves).topk(3)
    assert torch.equal(actual.indices, indices)
    assert actual.log_normalizer.numel() == actual.probability_sum.numel() == 0
    upstream = torch.randn_like(values)
    expected = torch.autograd.grad(values, leaves, upstream)
    for a, e in zip(torch.autograd.grad(actual.logits, leaves, upstream), expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        assert torch.equal(route(*leaves, top_k=3).indices, indices)


@pytest.mark.usefixtures("recomputing")
def test_gradcheck():
    x, weight, bias = inputs(4, 3, 7)

    def differentiable(x, weight, bias):
        found = route(x, weight, bias, top_k=2, statistics=True)
        return found.logits, found.log_normalizer, found.probability_sum

    assert torch.autograd.gradcheck(differentiable, (x, weight, bias))


def test_which_logits_are_kept(monkeypatch):
    """A quarter of a gigabyte decides; the tensors that autograd keeps show it."""
    kept = []
    leaves = inputs(30, 6, 20, bias=False)

    def largest_saved():
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
            route(*leaves, top_k=2, statistics=True)
        return max(kept)

    assert largest_saved() == 30 * 20
    monkeypatch.setattr(api, "KEPT_BYTES", 30 * 20 * 8 - 1)
    assert largest_saved() == 30 * 6


def test_opcheck():
    x, weight, bias = inputs(6, 5, 11, dtype=torch.float32)
    for statistics in (True, False):
        arguments = (x, weight, bias, torch.rand(6), 3, 20.0, statistics, statistics, "chunks")
        library.opcheck(torch.ops.torchdsc.route.default, arguments)


def exact(x, weight, bias, top_k):
    logits = functional.linear(x.double(), weight.double(), None if bias is None else bias.double())
    return logits, *logits.topk(top_k)


def assert_selects_exactly(x, weight, bias, top_k):
    values, indices = screened.forward(x, weight, bias, top_k)
    logits, expected, _ = exact(x, weight, bias, top_k)
    # What a float32 product may be off by; atoms closer than that to each other may change places.
    slack = 4e-6 * (x.double().norm(dim=1, keepdim=True) * weight.double().norm(dim=1).max() + 1e-30)
    if bias is not None:
        slack = slack + 4e-7 * bias.double().abs().max()
    assert ((values.double() - expected).abs() <= slack).all()
    assert ((logits.gather(1, indices) - values.double()).abs() <= slack).all()
    assert all(len(set(row)) == top_k for row in indices.tolist())


@needs_bfloat16
class TestScreened:
    @pytest.mark.parametrize(
        ("tokens", "width", "atoms", "top_k"),
        [
            (64, 384, 1523, 4),
            (513, 31, 257, 3),
            (65, 1, 64, 1),
            (100, 17, 640, 10),
            (64, 384, 1024, 16),
            (70, 8, 70, 64),
            (100, 128, 575, 32),
        ],
    )
    @pytest.mark.parametrize("bias", [False, True])
    def test_selects_what_float64_selects(self, tokens, width, atoms, top_k, bias):
        x, weight = torch.randn(tokens, width), torch.randn(atoms, width)
        assert_selects_exactly(x, weight, torch.randn(atoms) if bias else None, top_k)

    @settings(max_examples=60, deadline=None)
    @given(
        seed=st.integers(0, 10**6),
        scale=st.sampled_from([1e-12, 1e-3, 1.0, 1e8]),
        spread=st.sampled_from([0.0, 1e-4, 1e-2, 1.0]),
        heavy=st.booleans(),
        bias=st.sampled_from([None, 1e-3, 1e3]),
        top_k=st.sampled_from([3, 32]),
    )
    def test_property_near_ties_and_unequal_rows(self, seed, scale, spread, heavy, bias, top_k):
        """Atoms that bfloat16 cannot tell apart, rows of very different norms, biases that dwarf the product."""
        torch.manual_seed(seed)
        x = torch.randn(64, 24) * scale
        weight = torch.randn(1, 24) + spread * torch.randn(200, 24)
        if heavy:
            weight = weight * torch.logspace(-3, 3, 200).unsqueeze(1)[torch.randperm(200)]
        assert_selects_exactly(x, weight, None if bias is None else torch.randn(200) * bias, top_k)

    @pytest.mark.parametrize("source", ["token", "weight", "product"])
    def test_where_bfloat16_prefers_another_atom(self, source):
        """One kind of rounding error alone, at its worst: atom 0 is the largest, and atom 1 is at low precision."""
        # 1.0039 rounds down to 1 and 1.0040 up to 1.0078; what else occurs is exact.
        down, up, bias = 1.0039, 1.0040, None
        if source == "token":
            features, atoms = [down, up, 1.0, 0.0], [[1.0, 0.0, -1.0, 0.0], [0.0, 0.875, -0.875, 0.0]]
        elif source == "weight":
            features, atoms = [1.0, 1.0, 1.0, 1.0], [[down, 0.0, -1.0, 0.0], [0.0, 1.0, -1.0, 2.0**-9]]
        else:
            # The product is rounded before the bias is added.
            features, atoms = [1.0, 1.0, 0.0, 0.0], [[1.0, 0.0037, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0]]
            atoms[0][1] = float(torch.tensor(atoms[0][1]).bfloat16())
            bias = torch.full((128,), -5.0)
            bias[:2] = torch.tensor([0.0, 0.0035])
        x = torch.tensor(features).expand(64, 4)
        weight = torch.full((128, 4), -4.0) * torch.tensor(features).sign()
        weight[:2] = torch.tensor(atoms)
        x, weight = (t.repeat_interleave(8, dim=1).contiguous() for t in (x, weight))
        if source == "product":
            x, weight = (t[:, ::8].contiguous() for t in (x, weight))
        low = functional.linear(x.bfloat16(), weight.bfloat16()).float()
        assert ((low if bias is None else low + bias).argmax(1) == 1).all(), "the case that this test is for"
        assert (screened.forward(x, weight, bias, 1)[1] == 0).all()

    def test_is_what_inference_takes(self, monkeypatch):
        taken = []
        forward = screened.forward
        monkeypatch.setattr(screened, "forward", lambda *a: taken.append(1) or forward(*a))
        x, weight = torch.randn(64, 8), torch.randn(300, 8)
        with torch.no_grad():
            selection = route(x, weight, top_k=4)
            assert taken
            taken.clear()
            for arguments in ({"x": x[:63]}, {"top_k": 10}, {"statistics": True}):
                route(**{"x": x, "weight": weight, "top_k": 4} | arguments)
            route(x.double(), weight.double(), top_k=4)
        route(x, weight.requires_grad_(), top_k=4)
        assert not taken
        assert torch.equal(selection.indices, exact(x, weight, None, 4)[2])

    @pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf, 3.4e38])
    @pytest.mark.parametrize("where", ["x", "weight", "bias"])
    def test_what_is_not_finite_is_left_to_float32(self, bad, where):
        tensors = {"x": torch.randn(80, 8), "weight": torch.randn(300, 8), "bias": torch.randn(300)}
        tensors[where].view(-1)[17] = bad
        if not (where == "bias" and bad == 3.4e38):
            assert screened.forward(*tensors.values(), 4) is None
        with torch.no_grad():
            selection = route(**tensors, top_k=4)
        expected = functional.linear(*tensors.values()).topk(4).values
        torch.testing.assert_close(selection.logits, expected, equal_nan=True)


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"x": torch.zeros(3, 4)}, ValueError, r"x must have shape \(T, d\) and weight \(M, d\), got \(3, 4\)"),
        ({"x": torch.zeros(5)}, ValueError, r"x must have shape"),
        ({"weight": torch.zeros(7, 5).double()}, TypeError, r"weight must have the dtype of x, torch.float32"),
        ({"bias": torch.zeros(6)}, ValueError, r"bias must have shape \(7,\), got \(6,\)"),
        ({"bias": torch.zeros(7).double()}, TypeError, r"bias must have the dtype of x"),
        ({"top_k": 8}, ValueError, r"top_k must be in \[1, num_atoms = 7\], got 8"),
        ({"top_k": 0}, ValueError, r"top_k must be in"),
        ({"token_mask": torch.ones(4)}, ValueError, r"token_mask must have shape \(3,\), got \(4,\)"),
    ],
    ids=str,
)
def test_errors(change, error, match):
    arguments = {"x": torch.zeros(3, 5), "weight": torch.zeros(7, 5), "top_k": 2}
    with pytest.raises(error, match=match):
        route(**arguments | change)
