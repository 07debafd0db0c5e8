import math

import numpy as np
import pytest

from torchdsc.lab.adapt.metrics import score


def logits_of(chosen):
    return np.eye(2)[np.array(chosen)]


def test_accuracy_f1_and_matthews_by_hand():
    labels = np.array([1, 1, 1, 0, 0, 1])
    logits = logits_of([1, 1, 0, 0, 1, 1])  # tp 3, fn 1, tn 1, fp 1
    assert score("accuracy", logits, labels) == pytest.approx(100 * 4 / 6)
    assert score("f1", logits, labels) == pytest.approx(100 * 6 / 8)
    assert score("matthews", logits, labels) == pytest.approx(100 * (3 * 1 - 1 * 1) / math.sqrt(4 * 4 * 2 * 2))


def test_matthews_of_a_constant_choice_is_zero():
    assert score("matthews", logits_of([1, 1, 1]), np.array([1, 0, 1])) == 0.0


def test_correlation_is_the_mean_of_pearson_and_spearman():
    values, labels = np.array([1.0, 2.0, 3.0, 10.0]), np.array([1.0, 2.0, 2.0, 4.0])
    pearson = np.corrcoef(values, labels)[0, 1]
    spearman = np.corrcoef([1, 2, 3, 4], [1, 2.5, 2.5, 4])[0, 1]
    assert score("correlation", values[:, None], labels) == pytest.approx(50 * (pearson + spearman))
    assert score("correlation", np.ones((4, 1)), labels) == 0.0


def test_agrees_with_scikit_learn():
    metrics = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=(200, 2)), rng.integers(0, 2, 200)
    chosen = logits.argmax(1)
    assert score("matthews", logits, labels) == pytest.approx(100 * metrics.matthews_corrcoef(labels, chosen))
    assert score("f1", logits, labels) == pytest.approx(100 * metrics.f1_score(labels, chosen))


@pytest.mark.parametrize("metric", ["accuracy", "f1", "matthews", "correlation"])
def test_predictions_that_are_not_finite_score_nan(metric):
    assert math.isnan(
        score(
            metric, np.array([[0.0, np.nan], [1.0, 0.0]])[:, : 1 + (metric != "correlation")] * np.nan, np.array([0, 1])
        )
    )


def test_unknown_metric():
    with pytest.raises(ValueError, match=r"metric must be one of .* got 'loss'"):
        score("loss", logits_of([1]), np.array([1]))
