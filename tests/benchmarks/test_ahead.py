"""Every way to route gives the same outputs, and caches have seen what the benchmark says."""

import pytest
import torch

from benchmarks.case import Settings
from benchmarks.suite import load
from benchmarks.suite.ahead import SUBJECT, NgramCache, count_seen, trigrams


@pytest.fixture(scope="module")
def cases():
    return list(load("ahead").cases(Settings(quick=True)))


def ngrams_of(call):
    return call.func.__self__.ngrams


def kinds(cases):
    return [case.point["kind"] for case in cases]


def test_the_same_outputs(cases):
    assert kinds(cases) == ["prefill", "decode", "decode", "training"]
    for case in cases:
        expected = case.calls[SUBJECT]()
        assert expected.isfinite().all()
        for name, call in case.calls.items():
            for _ in range(2):
                torch.testing.assert_close(call(), expected, msg=lambda text, name=name: f"{name}: {text}")


def test_the_same_gradients(cases):
    case = cases[-1]
    gradients = []
    for call in case.calls.values():
        call()
        gradients.append([parameter.grad.clone() for parameter in call.func.__self__.model.parameters()])
    torch.testing.assert_close(*gradients)


def test_outputs_depend_on_routings(cases):
    for case in cases[:-1]:
        ngrams = ngrams_of(case.calls["n-grams, all seen"])
        expected, coefficients = case.calls[SUBJECT](), ngrams.coefficients.clone()
        ngrams.coefficients.zero_()
        assert not torch.allclose(case.calls["n-grams, all seen"](), expected)
        ngrams.coefficients.copy_(coefficients)


def test_products_that_are_left(cases, monkeypatch):
    """How many tokens each call of an n-gram cache still computes the routing of, and in how many steps."""
    stored = []
    original = NgramCache._store

    def store(self, seen, missing, first):
        stored.append(len(missing))
        original(self, seen, missing, first)

    monkeypatch.setattr(NgramCache, "_store", store)
    expected = {"prefill": [[], [6], [12]], "decode": [[], [1] * 2, [1] * 4]}
    for case in cases[:-1]:
        batch = case.point["batch"]
        names = ("n-grams, all seen", "n-grams, half seen", "n-grams, none seen")
        for name, counts in zip(names, expected[case.point["kind"]], strict=True):
            stored.clear()
            case.calls[name]()
            # With two sequences, one of them at each step.
            assert stored == (counts if batch == 1 else {0: [], 2: [1] * 4, 4: [2] * 4}[len(counts)])


def test_trigrams_count_what_precedes():
    assert trigrams([5, 7, 5], 9) == [(9 * 10 + 9) * 10 + 5, (9 * 10 + 5) * 10 + 7, 575]
    text = trigrams([1, 2, 3, 1, 2, 3, 4], 9)
    assert count_seen(text, set()) == 1
    assert count_seen(text, {234}) == 2
