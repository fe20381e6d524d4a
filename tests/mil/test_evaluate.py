import numpy as np
import pytest
import torch
from scipy import stats

from eosin.mil._data import MemoryBags
from eosin.mil._evaluate import bootstrap, predict_outputs, summarise_folds
from eosin.mil.methods.abmil import Abmil
from eosin.mil.task import make_task
from eosin.mil.tasks._classification import Classification

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


def told_apart(n_patients, slides=1, wrong=0):
    """Return outputs and targets of patients of two classes in turn, of whom the last few are wrong."""
    truth = np.repeat(np.arange(n_patients) % 2, slides)
    positive = np.linspace(0.1, 0.2, len(truth)) + 0.7 * truth
    if wrong:
        positive[-wrong * slides :] = 1 - positive[-wrong * slides :]
    return np.stack([1 - positive, positive], 1), truth, np.repeat([f"p{i}" for i in range(n_patients)], slides)


BOUNDED = ("auc", "accuracy", "balanced_accuracy", "sensitivity", "specificity", "kappa", "f1", "average_precision")


@pytest.mark.parametrize("metric", BOUNDED)
@pytest.mark.parametrize(("patients", "slides"), [(20, 1), (20, 5), (2, 1), (200, 1)])
def test_patients_who_are_told_apart_perfectly_leave_room_for_error(metric, patients, slides):
    found = bootstrap(TASK, *told_apart(patients, slides), resamples=50)[metric]
    assert found.value == found.upper == 1
    assert found.lower < 1 - 1 / patients


def test_more_slides_of_the_same_patients_add_little():
    one, five = (bootstrap(TASK, *told_apart(20, slides), resamples=50)["sensitivity"] for slides in (1, 5))
    assert five.lower < one.lower + 0.05


@pytest.mark.parametrize("patients", [20, 60])
def test_rates_have_wilsons_interval(patients):
    """With one slide per patient and Student's quantile; by hand, not by the function that is tested."""
    found = bootstrap(TASK, *told_apart(patients, wrong=4), resamples=4000)["accuracy"]
    share = 1 - 4 / patients
    z = stats.t.ppf(0.975, patients - 1)
    centre = (share + z**2 / (2 * patients)) / (1 + z**2 / patients)
    half = z / (1 + z**2 / patients) * np.sqrt(share * (1 - share) / patients + z**2 / (4 * patients**2))
    assert (found.lower, found.upper) == pytest.approx((centre - half, centre + half), abs=0.01)


def test_all_slides_of_one_patient_say_almost_nothing():
    outputs, truth, _ = told_apart(12, wrong=2)
    for name, found in bootstrap(TASK, outputs, truth, ["p"] * 12, resamples=20).items():
        if name in BOUNDED:
            assert found.upper - found.lower > 0.8
        else:
            assert found.lower is None


def test_constant_scores_have_no_certain_area():
    truth = np.arange(40) % 2
    found = bootstrap(TASK, np.full((40, 2), 0.5), truth, [str(i) for i in range(40)], resamples=50)["auc"]
    assert found.value == 0.5
    assert found.lower < 0.4 < 0.6 < found.upper


@pytest.mark.parametrize("slides", [1, 4])
def test_a_coverage_near_the_promised(slides):
    inside = 0
    truth_value = 0.9214  # area between two unit normals 2 apart
    for seed in range(60):
        rng = np.random.default_rng(seed)
        truth = np.repeat(np.arange(40) % 2, slides)
        noise = np.sqrt(0.5) * (np.repeat(rng.normal(size=40), slides) + rng.normal(size=40 * slides))
        positive = 1 / (1 + np.exp(-(2 * truth + noise)))
        patients = np.repeat([str(i) for i in range(40)], slides)
        found = bootstrap(TASK, np.stack([1 - positive, positive], 1), truth, patients, resamples=80, seed=seed)["auc"]
        inside += found.lower <= truth_value <= found.upper
    assert inside >= 53


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
    assert summary["auc"]["interval"] == pytest.approx([0.85 - 12.706 * 0.05, 1.0], rel=1e-3)
    assert summary["f1"] == {
        "mean": None,
        "standard_deviation": None,
        "standard_error": None,
        "interval": None,
        "n_folds": 0,
    }
    assert summarise_folds([{"auc": 0.8}])["auc"]["standard_error"] is None


@pytest.mark.parametrize(
    ("metric", "values", "ends"),
    [
        ("auc_c1", [1.0, 0.1], (0.0, 1.0)),
        ("kappa", [1.0, -0.9], (-1.0, 1.0)),
        ("er_log_loss", [0.1, 3.0], (0.0, 1e9)),
        ("grade_quadratic_kappa", [0.9, 0.2], (-1.0, 1.0)),
        ("sensitivity", [1.0, 0.4], (0.0, 1.0)),
    ],
)
def test_intervals_over_few_folds_stay_within_what_a_metric_can_be(metric, values, ends):
    low, high = summarise_folds([{metric: value} for value in values])[metric]["interval"]
    assert ends[0] <= low < np.mean(values) < high <= ends[1]


def test_folds_that_share_training_slides_have_a_wider_interval():
    """Nadeau and Bengio: the variance of a mean over k folds is s² (1/k + test/train)."""
    folds = [{"auc": value} for value in (0.7, 0.75, 0.8, 0.85)]
    plain, corrected = (summarise_folds(folds, test_per_train=ratio)["auc"] for ratio in (0.0, 1 / 3))
    assert corrected["standard_error"] / plain["standard_error"] == pytest.approx(np.sqrt((1 / 4 + 1 / 3) / (1 / 4)))


def test_folds_that_are_all_alike_have_no_interval():
    assert summarise_folds([{"auc": 1.0}, {"auc": 1.0}])["auc"]["interval"] is None


def test_the_interval_of_a_small_calibration_error_holds_it():
    task = make_task("binary", [{"label": "0"}, {"label": "1"}])
    positive = np.repeat([0.55, 0.65, 0.75, 0.85, 0.95], 20)
    truth = (np.arange(100) % 20 < np.round(20 * positive)).astype(np.int64)  # every bin is as predicted
    found = bootstrap(task, np.stack([1 - positive, positive], 1), truth, [str(n) for n in range(100)], resamples=200)
    error = found["ece"]
    assert error.lower == 0
    assert error.value == pytest.approx(0, abs=1e-12)
    assert 0.02 < error.upper < 0.1
