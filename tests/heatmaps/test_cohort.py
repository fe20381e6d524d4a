import numpy as np
import pytest
from scipy.stats import binomtest

from eosin.errors import ConfigError
from eosin.heatmaps._cohort import _turned, holm, mean_change, summarise_cohort
from eosin.heatmaps._counterfactual import Effect, Origin


def effect(before, after, control=None, origin=Origin.REGION):
    return Effect("remove", "top tiles", 3, before, after, control, origin=origin)


def test_removal_that_loses_the_tumour_slides():
    rng = np.random.default_rng(0)
    positive = [effect(3 + rng.normal(), -2 + rng.normal() * 0.1, control=2.9) for _ in range(12)]
    negative = [effect(-3 + rng.normal() * 0.1, -3.1, control=-3.0) for _ in range(12)]
    truth = [True] * 12 + [False] * 12
    patients = [f"p{i // 2}" for i in range(24)]
    summary = summarise_cohort([*positive, *negative], truth, patients)
    assert (summary.n_slides, summary.n_patients) == (24, 12)
    assert summary.sensitivity == (1.0, 0.0)
    assert -1 <= summary.sensitivity_change[0] < summary.sensitivity_change[1] < -0.2
    assert summary.specificity == (1.0, 1.0)
    changes = np.array([e.change for e in (*positive, *negative)])
    assert summary.change == pytest.approx(changes.reshape(12, 2).mean(1).mean())
    assert summary.interval[0] < summary.change < summary.interval[1] < 0
    assert summary.change_over_random < 0
    assert summary.p < 0.01
    assert summary.p_turned == pytest.approx(2 * 0.5**6)  # six patients lose both of their slides


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
    with pytest.raises(ConfigError, match="the same intervention"):
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


def turned(seed, patients, slides):
    """Return effects under which patients turn as often from right to wrong as back, with all their slides."""
    rng = np.random.default_rng(seed)
    effects = []
    for _ in range(patients):
        turns, to_wrong = rng.random() < 0.3, rng.random() < 0.5
        before, after = (1.0, -1.0) if turns and to_wrong else (-1.0, 1.0) if turns else (1.0, 1.0)
        effects += [effect(before, after)] * slides
    return effects, [True] * (patients * slides), np.repeat([f"p{n}" for n in range(patients)], slides).tolist()


@pytest.mark.parametrize("slides", [1, 5])
def test_turned_predictions_are_counted_by_patient(slides):
    """Under the null hypothesis at most one test in twenty rejects, however many slides a patient has."""
    rejected = sum(summarise_cohort(*turned(seed, 40, slides)).p_turned < 0.05 for seed in range(200))
    assert rejected <= 16  # 99 % of the binomial with 5 %


def test_one_slide_per_patient_is_mcnemars_test():
    for seed in range(20):
        effects, truth, patients = turned(seed, 30, 1)
        lost = sum(e.before > 0 > e.after for e in effects)
        won = sum(e.before < 0 < e.after for e in effects)
        expected = binomtest(lost, lost + won).pvalue if lost + won else 1.0
        assert summarise_cohort(effects, truth, patients).p_turned == pytest.approx(expected)


@pytest.mark.parametrize("origin", Origin)
def test_tiles_that_the_model_chose_have_no_p_value_against_no_change(origin):
    tested = origin is Origin.REGION
    effects = [effect(1.0, 0.5 + n / 100, control=1.0, origin=origin) for n in range(12)]
    summary = summarise_cohort(effects, [True] * 12, [f"p{n}" for n in range(12)])
    assert (summary.p is not None, summary.p_over_random is not None) == (tested, tested)
    assert (summary.p_turned is not None) == tested
    assert summary.p_shuffled is None


def test_the_change_is_ranked_among_models_with_shuffled_weights():
    effects = [effect(1.0, 0.0, origin=Origin.SEARCH)] * 2
    shuffled = [0.1, -1.5, 1.0, *[0.0] * 16]
    assert summarise_cohort(effects, None, ["a", "b"], shuffled=shuffled).p_shuffled == 3 / 20
    assert mean_change([effect(0, 1), effect(0, 3), effect(0, 4)], ["a", "a", "b"]) == 3
    assert mean_change([], []) == 0


def test_p_values_are_adjusted_for_their_number():
    assert holm([0.01, None, 0.04, 0.03]) == pytest.approx([0.03, None, 0.06, 0.06])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


@pytest.mark.parametrize("patients", [["a"] * 4, ["a", "a", "b", "b"]])
def test_one_or_two_patients_claim_nothing(patients):
    summary = summarise_cohort([effect(1.0, -n) for n in range(1, 5)], [True] * 4, patients)
    assert summary.p > 0.4
    assert summary.p_turned >= 0.5
    low, high = summary.sensitivity_change
    assert -1 <= low < high <= 1
    assert high > 0
    assert np.isnan(summary.interval).all() == (len(set(patients)) == 1)


def test_without_patients_every_slide_is_one_and_the_test_is_mcnemar():
    right = np.array([[True, False]] * 7 + [[False, True]] * 2 + [[True, True]] * 5)
    assert _turned(right) == pytest.approx(binomtest(2, 9).pvalue)
