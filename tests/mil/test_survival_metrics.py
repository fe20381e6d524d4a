"""Survival metrics beside scikit-survival, which is no dependency of the package, and by hand."""

import numpy as np
import pytest

from eosin.mil.cox import Cox
from eosin.mil.survival import DiscreteSurvival
from eosin.mil.survival_metrics import (
    concordance,
    discordance,
    integrated_brier,
    kaplan_meier,
    log_rank,
    time_auc,
    uncensored,
)

sksurv = pytest.importorskip("sksurv.metrics")


def cohort(seed, n=120, *, ties):
    rng = np.random.default_rng(seed)
    risk = rng.normal(size=n)
    died, lost = rng.exponential(np.exp(-risk)), rng.exponential(1.5, size=n)
    time, event = np.minimum(died, lost) + 0.1, died <= lost
    time = np.round(time * 8) / 8 + 0.125 if ties else time
    time[0], event[0] = time.max() + 1, False
    return risk + rng.normal(size=n), time, event


def structured(time, event):
    return np.array(list(zip(event, time, strict=True)), dtype=[("event", bool), ("time", float)])


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("seed", range(5))
def test_all_are_scikit_survivals(seed, ties):
    risk, time, event = cohort(seed, ties=ties)
    truth, times = structured(time, event), np.quantile(time[event], [0.25, 0.5, 0.75])
    _, mean = sksurv.cumulative_dynamic_auc(truth, truth, risk, times)
    assert time_auc(risk, time, event, times) == pytest.approx(mean, abs=1e-12)
    survival = np.exp(-np.exp(risk)[:, None] * times * 0.5)
    expected = sksurv.integrated_brier_score(truth, truth, survival, times)
    assert integrated_brier(survival, time, event, times) == pytest.approx(expected, abs=1e-12)
    harrell = sksurv.concordance_index_censored(event, time, risk)[0]
    assert concordance(risk, time, event) == pytest.approx(harrell, abs=1e-12)


@pytest.mark.parametrize("ties", [False, True])
def test_curves_are_scikit_survivals(ties):
    from sksurv.compare import compare_survival
    from sksurv.nonparametric import CensoringDistributionEstimator, kaplan_meier_estimator

    risk, time, event = cohort(3, ties=ties)
    times, survival = kaplan_meier(time, event)
    theirs = kaplan_meier_estimator(event, time)
    np.testing.assert_allclose(times, theirs[0])
    np.testing.assert_allclose(survival, theirs[1])
    estimator = CensoringDistributionEstimator().fit(structured(time, event))
    np.testing.assert_allclose(uncensored(time, event, time), estimator.predict_proba(time))
    groups = (risk > np.median(risk)).astype(np.int64)
    assert log_rank(groups, time, event) == pytest.approx(compare_survival(structured(time, event), groups)[0])


def test_what_is_not_defined_is_none():
    risk, time, event = cohort(0, ties=False)
    assert time_auc(risk, time, np.zeros(len(time), bool), np.array([1.0])) is None
    assert time_auc(risk, time, event, np.array([time.max()])) is None
    assert time_auc(risk, time, event, np.array([])) is None
    curve = np.full((len(time), 2), 0.5)
    assert integrated_brier(curve, time, event, np.array([1.0, time.max()])) is None
    assert integrated_brier(curve[:, :1], time, event, np.array([1.0])) is None
    assert log_rank(np.zeros(len(time), np.int64), time, event) is None
    assert Cox().metrics(risk[:, None], np.stack([time, event], 1))["time_auc"] is None


def test_discordance_is_the_share_of_wrong_pairs_of_each_patient():
    time, event = np.array([1.0, 2.0, 3.0]), np.array([True, True, False])
    wrong = discordance(np.array([0.0, 2.0, 1.0]), time, event)
    np.testing.assert_allclose(wrong, [1.0, 0.5, 0.5])
    assert np.isnan(discordance(np.zeros(2), np.array([1.0, 2.0]), np.zeros(2, bool))).all()


def test_folds_with_other_bins_are_judged_at_common_times():
    """The same exponential curve, read off at the edges of two folds, comes out as one curve at common edges."""
    task = DiscreteSurvival(bins=4)
    folds = [task.model_copy(update={"edges": edges}) for edges in ((1.0, 2.0, 3.0), (1.2, 2.2, 3.4))]
    outputs = [np.tile(np.append(1 - np.array(fold.edges) / 10, 0.5), (3, 1)) for fold in folds]
    pooled, values = task.pooled(folds, outputs)
    assert pooled.edges == pytest.approx((1.1, 2.1, 3.2))
    np.testing.assert_allclose(values[3:, :3], np.tile(1 - np.array(pooled.edges) / 10, (3, 1)))
    np.testing.assert_allclose(values[:3, :2], np.tile(1 - np.array(pooled.edges[:2]) / 10, (3, 1)))
    assert values.shape == (6, 4)


def test_groups_compare_within_only_whatever_the_levels_of_their_risks():
    risk, time, event = cohort(1, n=150, ties=False)
    groups, times = np.arange(150) % 3, np.quantile(time[event], [0.25, 0.5])
    pairs = right = 0.0
    for group in range(3):
        rows = groups == group
        comparable = (event[rows][:, None] & (time[rows][:, None] < time[rows][None, :])).sum()
        pairs += comparable
        right += comparable * concordance(risk[rows], time[rows], event[rows])
    assert concordance(risk, time, event, groups=groups) == pytest.approx(right / pairs, abs=1e-12)
    moved, target = risk + 100 * groups, np.stack([time, event], 1)
    task = Cox(edges=tuple(times))
    fair = task.metrics(risk[:, None], target, folds=groups)
    assert fair == pytest.approx(task.metrics(moved[:, None], target, folds=groups))
    assert task.metrics(moved[:, None], target)["cindex"] < fair["cindex"] - 0.05
    surprise = task.surprise(moved[:, None], target, folds=groups)
    np.testing.assert_allclose(surprise, discordance(risk, time, event, groups=groups))
    assert time_auc(risk, time, event, times, groups=np.zeros(150, int)) == pytest.approx(
        time_auc(risk, time, event, times)
    )
