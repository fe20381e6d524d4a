import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as reference

from eosin.mil._metrics import (
    average_precision,
    balanced_accuracy,
    best_threshold,
    calibration_curve,
    classification_metrics,
    confusion,
    expected_calibration_error,
    f1_macro,
    kappa,
    roc_auc,
)


def a_sample(seed, n=40, classes=2, ties=True):
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(n, classes))
    probabilities = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    return (probabilities.round(1) if ties else probabilities), rng.integers(classes, size=n)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.booleans())
def test_areas_are_those_of_scikit_learn(seed, ties):
    probabilities, truth = a_sample(seed, ties=ties)
    scores, positive = probabilities[:, 1], truth == 1
    if positive.all() or not positive.any():
        return
    assert roc_auc(scores, positive) == pytest.approx(reference.roc_auc_score(positive, scores), abs=1e-12)
    assert average_precision(scores, positive) == pytest.approx(
        reference.average_precision_score(positive, scores), abs=1e-12
    )


@pytest.mark.parametrize("classes", [2, 4])
def test_class_metrics_are_those_of_scikit_learn(classes):
    probabilities, truth = a_sample(3, n=80, classes=classes, ties=False)
    predicted = probabilities.argmax(1)
    names = tuple("abcd"[:classes])
    found = classification_metrics(probabilities, truth, predicted, names)
    one_hot = np.eye(classes)[truth]
    scored = slice(1, 2) if classes == 2 else slice(None)
    assert found["accuracy"] == pytest.approx(reference.accuracy_score(truth, predicted))
    assert found["balanced_accuracy"] == pytest.approx(reference.balanced_accuracy_score(truth, predicted))
    assert found["f1"] == pytest.approx(reference.f1_score(truth, predicted, average="macro"))
    assert found["kappa"] == pytest.approx(reference.cohen_kappa_score(truth, predicted))
    assert found["auc"] == pytest.approx(reference.roc_auc_score(one_hot[:, scored], probabilities[:, scored]))
    scored = probabilities[:, 1] if classes == 2 else probabilities
    assert found["brier"] == pytest.approx(reference.brier_score_loss(truth, scored))
    assert found["log_loss"] == pytest.approx(reference.log_loss(truth, probabilities))
    assert ("auc_a" in found) == (classes > 2)
    matrix = confusion(truth, predicted, classes)
    assert (matrix == reference.confusion_matrix(truth, predicted)).all()
    assert kappa(matrix, quadratic=True) == pytest.approx(
        reference.cohen_kappa_score(truth, predicted, weights="quadratic")
    )


def test_what_the_data_do_not_define_is_none_and_never_a_half():
    probabilities, _ = a_sample(0)
    truth = np.zeros(len(probabilities), np.int64)
    found = classification_metrics(probabilities, truth, probabilities.argmax(1), ("a", "b"))
    for name in ("auc", "average_precision", "balanced_accuracy", "f1"):
        assert found[name] is None
    assert found["accuracy"] is not None
    assert balanced_accuracy(np.array([[3, 0], [0, 0]])) is None
    assert f1_macro(np.array([[3, 0], [0, 0]])) is None
    assert kappa(np.array([[3, 0], [0, 0]])) is None


def test_calibration_error_by_hand():
    confidence = np.array([0.95, 0.95, 0.65, 1.0])
    correct = np.array([True, False, True, True])
    by_bin = [abs(0.95 + 0.95 + 1.0 - 2), abs(0.65 - 1)]
    assert expected_calibration_error(confidence, correct) == pytest.approx(sum(by_bin) / 4)


def test_the_calibration_curve_counts_every_prediction():
    rng = np.random.default_rng(0)
    confidence = rng.random(500)
    curve = calibration_curve(confidence, rng.random(500) < confidence)
    assert curve[:, 2].sum() == 500
    assert np.abs(curve[:, 0] - curve[:, 1]).max() < 0.15
    assert calibration_curve(np.array([1.0]), np.array([True])).tolist() == [[1.0, 1.0, 1.0]]


def test_the_threshold_separates_what_can_be_separated():
    scores = np.array([0.1, 0.2, 0.6, 0.7])
    assert best_threshold(scores, scores > 0.5) == pytest.approx(0.4)
    assert best_threshold(scores, scores < 0.5) == 0.5


@pytest.mark.parametrize("scores", [[0.3, 0.3, 0.3, 0.3], [0.9, 0.8, 0.2, 0.1]])
def test_a_model_that_separates_nothing_decides_at_one_half(scores):
    assert best_threshold(np.array(scores), np.array([False, False, True, True])) == 0.5
