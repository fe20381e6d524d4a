import numpy as np
import pytest

from eosin.errors import ConfigError
from eosin.heatmaps.cohort import summarise_cohort
from eosin.heatmaps.counterfactual import Effect


def effect(before, after, control=None):
    return Effect("remove", "top tiles", 3, before, after, control)


def test_removal_that_loses_the_tumour_slides():
    rng = np.random.default_rng(0)
    positive = [effect(3 + rng.normal(), -2 + rng.normal() * 0.1, control=2.9) for _ in range(12)]
    negative = [effect(-3 + rng.normal() * 0.1, -3.1, control=-3.0) for _ in range(12)]
    truth = [True] * 12 + [False] * 12
    patients = [f"p{i // 2}" for i in range(24)]
    summary = summarise_cohort([*positive, *negative], truth, patients)
    assert (summary.n_slides, summary.n_patients) == (24, 12)
    assert summary.sensitivity == (1.0, 0.0)
    assert summary.specificity == (1.0, 1.0)
    assert summary.change == pytest.approx(np.mean([e.change for e in (*positive, *negative)]))
    assert summary.interval[0] < summary.change < summary.interval[1] < 0
    assert summary.change_over_random < 0
    assert summary.p < 0.01
    assert summary.p_turned == pytest.approx(2 * 0.5**12)


def test_nothing_happens():
    summary = summarise_cohort([effect(1.0, 1.0), effect(-1.0, -1.0)], [True, False], ["a", "b"])
    assert (summary.change, summary.p, summary.p_turned) == (0, 1, 1)
    assert summary.interval == (0, 0)
    assert summary.change_over_random is None


def test_slides_of_a_patient_are_one_observation():
    rng = np.random.default_rng(1)
    shifts = np.repeat(rng.normal(size=8), 10)
    effects = [effect(0.0, shift) for shift in shifts]
    clustered = summarise_cohort(effects, [True] * 80, [f"p{i // 10}" for i in range(80)])
    naive = summarise_cohort(effects, [True] * 80, [f"p{i}" for i in range(80)])
    assert np.ptp(clustered.interval) > 2 * np.ptp(naive.interval)
    assert clustered.p > naive.p
    assert np.isnan(clustered.specificity).all()


def test_what_does_not_belong_together_is_refused():
    with pytest.raises(ConfigError, match="do not match"):
        summarise_cohort([effect(1, 0)], [True, False], ["a"])
    with pytest.raises(ConfigError, match="one intervention"):
        summarise_cohort([effect(1, 0), Effect("keep only", "x", 3, 1, 0)], [True, True], ["a", "b"])


def test_change_of_sensitivity_has_an_interval_and_truth_may_be_unknown():
    effects = [effect(2.0, -1.0 if i < 6 else 1.0, control=2.0) for i in range(10)]
    patients = [f"p{i}" for i in range(10)]
    summary = summarise_cohort(effects, [True] * 10, patients)
    assert summary.sensitivity == (1.0, 0.4)
    low, high = summary.sensitivity_change
    assert -1 <= low < -0.6 < high < 0
    assert np.isnan(summary.specificity_change).all()
    assert summary.effect_size == pytest.approx(np.mean([-3] * 6 + [-1] * 4) / np.std([-3] * 6 + [-1] * 4, ddof=1))
    assert summary.p_over_random < 0.05
    unknown = summarise_cohort(effects, None, patients)
    assert unknown.change == summary.change
    assert np.isnan(unknown.sensitivity).all()
    assert unknown.p_turned == 1
