"""What is registered runs, and compares calls that do the same."""

from pathlib import Path

import pytest
import torch

import torchdsc
from benchmarks import child, peak
from benchmarks.case import MemoryCase, Settings
from benchmarks.suite import NAMES, compose, crossover, layer, load, memory, older, recommended
from benchmarks.suite.published import published_compose
from torchdsc import DSC, DSCFeedForward
from torchdsc.ops import compose as library_compose
from torchdsc.ops import native

ROOT = Path(__file__).resolve().parents[2]
TIMED = [name for name in NAMES if name != "memory"]
ROW = {"calls": {"gather": {"subject_over_it": {"median": 1.0}}}}


def answered(cases):
    """Cases, each answered with a row before the next."""
    try:
        case = next(cases)
        while True:
            yield case
            case = cases.send(ROW)
    except StopIteration:
        return


@pytest.mark.parametrize("name", NAMES)
def test_names_and_tests(name):
    benchmark = load(name)
    assert benchmark.name == name
    assert benchmark.tests
    assert all((ROOT / path).exists() for path in benchmark.tests)


def test_unknown_name():
    with pytest.raises(ValueError, match=r"names must be among layer, .*crossover, got 'layers'"):
        load("layers")


@pytest.mark.parametrize("name", TIMED)
def test_every_quick_call_runs(name):
    if name == "compiled" and native.module_for() is None:
        pytest.skip("the optional compiled part was not built")
    points = []
    for case in answered(load(name).cases(Settings(quick=True))):
        assert case.subject in case.calls
        assert not set(case.calls) & set(case.left_out)
        assert case.floor is None or min(case.floor.bytes, case.floor.operations) > 0
        for call in case.calls.values():
            call()
        points.append(case.point)
    assert points
    assert all(points.count(point) == 1 for point in points)


class TestCompose:
    def test_published_is_the_same_equation(self):
        x, u, v = torch.randn(9, 6), torch.randn(20, 6), torch.randn(20, 6)
        indices, coefficients = torch.rand(9, 20).topk(3).indices, torch.rand(9, 3)
        expected = library_compose(x, u, v, indices, coefficients)
        torch.testing.assert_close(published_compose(x, u, v, indices, coefficients), expected)

    def test_leaves_out_what_does_not_fit(self, monkeypatch):
        sizes = {"tokens": 64, "atoms": 256, "top_k": 16, "width": 32}
        # Two gathers of 64 x 16 x 32 floats, twice that with gradients.
        needed = 2 * 2 * 64 * 16 * 32 * 4
        monkeypatch.setattr("benchmarks.suite.steps.MEMORY_LIMIT", needed - 1)
        for kind, left_out in (("forward", []), ("forward+backward", ["published"])):
            case = compose._case(*(sizes[name] for name in ("width", "atoms", "top_k", "tokens")), kind, "cpu")
            assert list(case.left_out) == left_out
            assert ("published" in case.calls) is not bool(left_out)

    def test_floor_counts_each_row_once(self):
        # One token, one atom: x, two rows, y, coefficient and index.
        assert compose._floor(1, 100, 1, 10, 1, "forward") == compose.Floor(4 * (10 + 20 + 10 + 1) + 8, 4 * 10)


class TestLayer:
    def test_floor_of_the_paper(self):
        floor = layer.Sizes().floor(1, "forward")
        weights = 384 * 1523 + 2 * 384 * 327 + 2 * 4 * 384
        assert (floor.bytes, floor.operations) == (4 * (weights + 2 * 384), 2 * weights)

    def test_scaled_sizes_keep_the_proportions(self):
        sizes = layer.Sizes().scaled(768, 16)
        assert (sizes.width, sizes.num_atoms, sizes.top_k, sizes.dense) == (768, 3046, 16, 5222)


class TestRecommended:
    def test_each_moe_by_kernel(self):
        for case in answered(load("recommended").cases(Settings(quick=True))):
            for name in ("moe", "moe, one shared"):
                timed = {call for call in case.calls if call.startswith(f"{name} (")}
                assert timed == {f"{name} (eager)", f"{name} (grouped_mm)"}
                assert f"{name} (batched_mm)" in case.left_out
            assert not {"moe", "moe, one shared"} & set(case.calls)

    def test_kernels_are_those_named(self):
        layers = recommended._layers(*recommended.SMALL)
        for name, moe in layers.items():
            if name.startswith("moe"):
                assert name.endswith(f"({moe.impl})")

    def test_says_what_the_processor_does(self):
        found = []

        def drained():
            found.append((yield from load("recommended").cases(Settings(quick=True))))

        assert list(answered(drained()))
        assert found == [{"instructions": torch.backends.cpu.get_cpu_capability()}]


class TestOlder:
    """Of a library that is compared with, and lacks the recommended layer."""

    def test_hand_wired_is_the_same_layer(self):
        sizes = {"num_atoms": 20, "top_k": 3, "normalize_embeddings": False}
        layers = DSCFeedForward(8, 6, **sizes), older.HandWired(8, 6, **sizes)
        states = [dict(layer.named_parameters()) for layer in layers]
        names = {name: name.removeprefix("layer.") for name in states[1]}
        assert set(names.values()) == set(states[0])
        with torch.no_grad():
            for name, parameter in states[1].items():
                # Away from what both start with.
                parameter.copy_(states[0][names[name]].add_(0.1 * torch.randn_like(parameter)))
        x, embeddings = torch.randn(2, 5, 8), torch.randn(2, 5, 8)
        torch.testing.assert_close(*(layer.eval()(x, embeddings) for layer in layers))

    def test_starts_alike(self):
        sizes = {"num_atoms": 20, "top_k": 3, "normalize_embeddings": False}
        layers = DSCFeedForward(8, 6, **sizes), older.HandWired(8, 6, **sizes)
        own, other = layers[0], layers[1]
        assert own.dsc.options == other.layer.dsc.options
        for name in ("router_context", "input_context"):
            torch.testing.assert_close(getattr(own, name).weight, getattr(other, name).weight)

    def test_names_of_before(self, monkeypatch):
        assert older._either("Residual", "DSCResidual") is torchdsc.Residual
        monkeypatch.delattr(torchdsc, "Residual")
        # Nor found when it is asked for.
        monkeypatch.setattr(torchdsc, "__all__", [name for name in torchdsc.__all__ if name != "Residual"])
        monkeypatch.setattr(torchdsc, "DSCResidual", DSC, raising=False)
        assert older._either("Residual", "DSCResidual") is DSC


@pytest.mark.parametrize(
    ("ratios", "expected"),
    [([0.9], 0.01), ([1.5, 0.5], 0.02), ([0.9, 1.5, 0.5], 0.045), ([2.0, 1.5, 1.0, 0.0], 0.06), ([3.0] * 7, 2.0)],
)
def test_crossover_lies_between_the_measured_ratios(ratios, expected):
    assert crossover.crossover(ratios) == expected


class TestMemory:
    @pytest.mark.skipif(torch.cuda.is_available() or not peak._can_set_back(), reason="of a resettable resident set")
    @pytest.mark.parametrize(
        "sizes",
        [
            # Gram matrices, then gathered rows decide.
            {"tokens": 256, "d": 64, "M": 4096, "K": 4},
            {"tokens": 2048, "d": 256, "M": 512, "K": 64},
        ],
    )
    def test_formula_against_a_measurement(self, sizes):
        computed = sum(memory.published_terms(**sizes).values())
        # A process of its own, as in the benchmark: what other tests left behind would count.
        measured = child.call("benchmarks.suite.memory:published_step", sizes)
        assert 0.9 < computed / measured < 1.05

    def test_terms(self):
        terms = memory.published_terms(tokens=8192, d=1024, M=16384, K=64)
        gibibytes = {name: size / 2**30 for name, size in terms.items()}
        assert gibibytes == {
            **{"logits": 1.5, "gathered rows": 4.0, "normalised banks": 0.125, "normed input and output": 0.0625},
            **{"Gram matrices": 3.0, "passing": 2.0},
        }

    @pytest.mark.parametrize(("available", "steps"), [(1 << 40, ["dsc", "published"]), (1 << 20, ["dsc"])])
    def test_what_does_not_fit_is_computed(self, monkeypatch, available, steps):
        monkeypatch.setattr(memory, "available_bytes", lambda device: available)
        [case] = list(load("memory").cases(Settings(quick=True)))
        assert isinstance(case, MemoryCase)
        assert list(case.steps) == steps
        assert ("published" in case.left_out) == (len(steps) == 1)
        assert set(case.computed) == {"published"}
