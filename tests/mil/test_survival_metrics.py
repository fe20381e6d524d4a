"""Survival metrics beside scikit-survival, which is not a dependency of the package, and by hand."""

import numpy as np
import pytest

from eosin.mil import _survival_metrics as survival_metrics
from eosin.mil._survival_metrics import (
    concordance,
    concordance_ipcw,
    discordance,
    integrated_brier,
    kaplan_meier,
    log_rank,
    time_auc,
    uncensored,
)
from eosin.mil.tasks._cox import Cox
from eosin.mil.tasks._survival import DiscreteSurvival

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
    uno = sksurv.concordance_index_ipcw(truth, truth, risk)[0]
    assert concordance_ipcw(risk, time, event) == pytest.approx(uno, abs=1e-12)


def test_the_weighted_concordance_does_not_depend_on_who_is_censored():
    """Risk that tells early events only: where many are censored, Harrell's C sees more of them, Uno's does not."""
    rng = np.random.default_rng(0)
    died = rng.uniform(0, 2, size=4000)
    risk = np.where(died < 1, 2 - died, 0) + 0.5 * rng.normal(size=4000)
    without = concordance(risk, died, np.ones(4000, bool))
    lost = rng.uniform(0, 2.1, size=4000)
    time, event = np.minimum(died, lost), died <= lost
    assert concordance(risk, time, event) - without > 0.03
    assert concordance_ipcw(risk, time, event) == pytest.approx(without, abs=0.015)


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


def pair_by_pair(risk, time, event, groups):
    """Return what every pair says: right or tied, and the rows, from the definition."""
    for i in range(len(risk)):
        for j in range(len(risk)):
            later = time[j] > time[i] or (time[j] == time[i] and not event[j])
            if i != j and event[i] and later and (groups is None or groups[i] == groups[j]):
                yield i, j, 0.5 if abs(risk[i] - risk[j]) <= 1e-8 else float(risk[i] > risk[j])


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("block", [1, 4, 256])
def test_blocks_of_patients_give_the_counts_of_all_pairs(monkeypatch, seed, block):
    monkeypatch.setattr(survival_metrics, "BLOCK", block)
    rng = np.random.default_rng(seed)
    n = int(rng.integers(1, 40))
    time = rng.integers(0, (4, 15, 1000)[seed % 3], n).astype(float)
    risk = rng.normal(size=n).round((0, 1, 9)[seed % 3])
    event = rng.random(n) < (0.2, 0.6, 1.0)[seed // 4]
    groups = rng.integers(0, 3, n) if seed % 2 else None
    pairs = list(pair_by_pair(risk, time, event, groups))
    found = concordance(risk, time, event, groups=groups)
    assert found == (pytest.approx(np.mean([share for *_, share in pairs])) if pairs else None)
    shares = discordance(risk, time, event, groups=groups)
    for row in range(n):
        own = [1 - share for i, j, share in pairs if row in (i, j)]
        assert shares[row] == pytest.approx(np.mean(own)) if own else np.isnan(shares[row])


def test_thousands_of_patients_are_compared_without_a_matrix_of_them():
    rng = np.random.default_rng(0)
    n = 20_000
    risk, time, event = rng.normal(size=n), rng.exponential(size=n), rng.random(n) < 0.5
    assert concordance(-time, time, event) == pytest.approx(1)
    assert concordance(risk, time.round(1), event) == pytest.approx(0.5, abs=0.02)
