import numpy as np
import pytest
import torch

from eosin.mil.data import MemoryBags
from eosin.mil.evaluate import bootstrap, predict_outputs, summarise_folds
from eosin.mil.methods.abmil import Abmil
from eosin.mil.tasks import Classification, make_task

TASK = Classification(classes=("a", "b"))


def scores(n, noise, seed=0):
    rng = np.random.default_rng(seed)
    truth = np.arange(n) % 2
    positive = 1 / (1 + np.exp(-(2 * truth - 1 + noise * rng.normal(size=n))))
    return np.stack([1 - positive, positive], 1), truth


def test_outputs_do_not_depend_on_the_budget():
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    bags = {str(n): torch.randn(n, 5, generator=generator).half() for n in (3, 0, 8, 1)}
    source = MemoryBags(bags, spec=None)
    source.spec = type("Spec", (), {"dim": 5})()
    model = Abmil(5, 2)
    whole = predict_outputs(model, TASK, source, list(bags))
    np.testing.assert_allclose(predict_outputs(model, TASK, source, list(bags), most_instances=4), whole, atol=1e-6)
    assert predict_outputs(model, TASK, source, []).shape == (0, 2)


def test_the_interval_holds_the_value_and_narrows_with_patients():
    outputs, truth = scores(60, 2.0)
    few = bootstrap(TASK, outputs, truth, [str(i) for i in range(60)], resamples=300)["auc"]
    assert few.lower < few.value < few.upper
    outputs, truth = scores(1200, 2.0)
    many = bootstrap(TASK, outputs, truth, [str(i) for i in range(1200)], resamples=300)["auc"]
    assert many.upper - many.lower < (few.upper - few.lower) / 2


def test_patients_are_drawn_whole():
    """Copies of a slide under one patient add nothing: the interval is that of the patients."""
    outputs, truth = scores(40, 2.0)
    patients = [str(i) for i in range(40)]
    once = bootstrap(TASK, outputs, truth, patients, resamples=200)
    copied = bootstrap(TASK, outputs.repeat(10, 0), truth.repeat(10), np.repeat(patients, 10), resamples=200)
    for name in ("auc", "accuracy", "balanced_accuracy"):
        assert copied[name].value == pytest.approx(once[name].value)
        assert copied[name].lower == pytest.approx(once[name].lower)
        assert copied[name].upper == pytest.approx(once[name].upper)


def test_a_coverage_near_the_promised():
    inside = 0
    truth_value = 0.9214  # area between two unit normals 2 apart
    for seed in range(60):
        outputs, truth = scores(80, 1.0, seed)
        interval = bootstrap(TASK, outputs, truth, [str(i) for i in range(80)], resamples=120, seed=seed)["auc"]
        inside += interval.lower <= truth_value <= interval.upper
    assert inside >= 51


def test_undefined_stays_undefined():
    outputs, _ = scores(6, 1.0)
    found = bootstrap(TASK, outputs, np.ones(6, np.int64), list("abcdef"), resamples=20)
    assert found["auc"].value is found["auc"].lower is None
    outputs, truth = scores(2, 0.0)
    found = bootstrap(TASK, outputs, truth, list("ab"), resamples=100)["auc"]
    assert found.value == 1.0
    assert found.n_defined < 100


def test_folds_are_summarised_without_the_undefined():
    summary = summarise_folds([{"auc": 0.8, "f1": None}, {"auc": None, "f1": None}, {"auc": 0.9, "f1": None}])
    assert summary["auc"]["mean"] == pytest.approx(0.85)
    assert summary["auc"]["n_folds"] == 2
    assert summary["auc"]["standard_error"] == pytest.approx(0.05)
    assert summary["auc"]["interval"] == pytest.approx([0.85 - 12.706 * 0.05, 0.85 + 12.706 * 0.05], rel=1e-3)
    assert summary["f1"] == {
        "mean": None,
        "standard_deviation": None,
        "standard_error": None,
        "interval": None,
        "n_folds": 0,
    }
    assert summarise_folds([{"auc": 0.8}])["auc"]["standard_error"] is None


def test_the_interval_of_a_small_calibration_error_holds_it():
    task = make_task("binary", [{"label": "0"}, {"label": "1"}])
    positive = np.repeat([0.55, 0.65, 0.75, 0.85, 0.95], 20)
    truth = (np.arange(100) % 20 < np.round(20 * positive)).astype(np.int64)  # every bin is as predicted
    found = bootstrap(task, np.stack([1 - positive, positive], 1), truth, [str(n) for n in range(100)], resamples=200)
    error = found["ece"]
    assert error.lower == 0
    assert error.value == pytest.approx(0, abs=1e-12)
    assert 0.02 < error.upper < 0.1
