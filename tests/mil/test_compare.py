import numpy as np
import pytest

from eosin.errors import LabelError
from eosin.mil._compare import delong, paired_bootstrap
from eosin.mil._metrics import roc_auc
from eosin.mil.tasks._classification import Binary

TASK = Binary(classes=("a", "b"))


def two_models(n=200, seed=0, gap=1.0):
    rng = np.random.default_rng(seed)
    positive = rng.random(n) < 0.5
    shared = rng.normal(size=n)
    first = shared + (1 + gap) * positive
    second = shared + 0.5 * rng.normal(size=n) + positive
    return first, second, positive


def by_definition(first, second, positive):
    """DeLong's variance straight from the kernel of all pairs."""
    kernels = [
        (s[positive][:, None] > s[~positive]) + 0.5 * (s[positive][:, None] == s[~positive]) for s in (first, second)
    ]
    rows = kernels[0].mean(1) - kernels[1].mean(1)
    columns = kernels[0].mean(0) - kernels[1].mean(0)
    return rows.var(ddof=1) / len(rows) + columns.var(ddof=1) / len(columns)


@pytest.mark.parametrize("decimals", [1, 9])
def test_delong_is_its_definition(decimals):
    first, second, positive = (x.round(decimals) if x.dtype == float else x for x in two_models())
    found = delong(first, second, positive)
    assert found.first == pytest.approx(roc_auc(first, positive))
    assert found.second == pytest.approx(roc_auc(second, positive))
    deviation = (found.upper - found.lower) / 2 / 1.959964
    assert deviation**2 == pytest.approx(by_definition(first, second, positive), rel=1e-4)
    assert found.p_value < 0.01


def test_equal_models_do_not_differ():
    first, _, positive = two_models()
    assert delong(first, first, positive).p_value == 1.0
    assert delong(first, first, np.ones(200, bool)).difference is None


def test_false_alarms_are_as_rare_as_promised():
    alarms = 0
    for seed in range(300):
        rng = np.random.default_rng(seed)
        positive = np.arange(80) % 2 == 0
        first, second = (positive + rng.normal(size=80) for _ in range(2))
        alarms += delong(first, second, positive).p_value < 0.05
    assert 4 <= alarms <= 28


def outputs(scores):
    positive = 1 / (1 + np.exp(-scores))
    return np.stack([1 - positive, positive], 1)


def test_the_paired_bootstrap_agrees_with_delong_on_independent_cases():
    first, second, positive = two_models(gap=0.5)
    patients = [str(i) for i in range(len(first))]
    found = paired_bootstrap(TASK, outputs(first), outputs(second), positive.astype(int), patients, resamples=400)[
        "auc"
    ]
    exact = delong(first, second, positive)
    assert found.difference == pytest.approx(exact.difference)
    assert found.lower == pytest.approx(exact.lower, abs=0.015)
    assert found.upper == pytest.approx(exact.upper, abs=0.015)


def test_equal_predictions_have_a_p_value_of_one_and_other_slides_are_refused():
    first, second, positive = two_models(40)
    patients = [str(i) for i in range(40)]
    same = paired_bootstrap(TASK, outputs(first), outputs(first), positive.astype(int), patients, resamples=20)
    assert same["auc"].p_value == 1.0
    with pytest.raises(LabelError, match="compare the same slides"):
        paired_bootstrap(TASK, outputs(first), outputs(second)[1:], positive.astype(int), patients)


def perfect(n):
    return outputs(np.where(np.arange(n) % 2 == 1, 3.0, -3.0) + np.linspace(0, 1, n))


def test_two_perfect_models_may_still_differ():
    """Both tell 20 patients apart: the data do not show that they are equal."""
    truth, patients = np.arange(20) % 2, [str(i) for i in range(20)]
    found = paired_bootstrap(TASK, perfect(20), perfect(20)[::-1][:, ::-1], truth, patients, resamples=50)["auc"]
    assert found.difference == 0
    assert found.lower < -0.1 < 0.1 < found.upper
    assert found.p_value == 1


def test_placements_without_spread_claim_nothing():
    scores, truth = np.arange(6.0), np.arange(6) >= 3
    found = delong(scores, -scores, truth)
    assert found.difference == 1
    assert found.p_value is None
    assert found.lower is None
