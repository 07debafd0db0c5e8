import math
import warnings

import numpy as np
import pytest

from torchdsc.lab.tasks.adaptation.metrics import score

LABELS = np.array([1, 1, 1, 0, 0, 1])


def logits_of(chosen):
    return np.eye(2)[np.array(chosen)]


def test_accuracy_f1_and_matthews_by_hand():
    logits = logits_of([1, 1, 0, 0, 1, 1])  # 3 true and 1 false positive, 1 true and 1 false negative
    assert score("accuracy", logits, LABELS) == pytest.approx(100 * 4 / 6)
    assert score("f1", logits, LABELS) == pytest.approx(100 * 6 / 8)
    assert score("matthews", logits, LABELS) == pytest.approx(100 * (3 * 1 - 1 * 1) / math.sqrt(4 * 4 * 2 * 2))


def test_correlation_is_the_mean_of_pearson_and_spearman():
    values, labels = np.array([1.0, 2.0, 3.0, 10.0]), np.array([1.0, 2.0, 2.0, 4.0])
    pearson = np.corrcoef(values, labels)[0, 1]
    spearman = np.corrcoef([1, 2, 3, 4], [1, 2.5, 2.5, 4])[0, 1]
    assert score("correlation", values[:, None], labels) == pytest.approx(50 * (pearson + spearman))


def test_a_constant_choice_is_zero_without_a_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert score("matthews", logits_of([1] * 6), LABELS) == 0.0
        assert score("f1", logits_of([0] * 6), 0 * LABELS) == 0.0
        assert score("correlation", np.full((4, 1), 0.1), np.full(4, 0.3)) == 0.0
        assert score("correlation", np.ones((1, 1)), np.ones(1)) == 0.0


@pytest.mark.parametrize("metric", ["accuracy", "f1", "matthews", "correlation"])
def test_predictions_that_are_not_finite_score_nan(metric):
    logits = np.array([[0.0, np.nan]]) if metric != "correlation" else np.array([[np.inf]])
    assert math.isnan(score(metric, logits, np.array([0])))
