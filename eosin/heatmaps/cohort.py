"""The same intervention on many slides: its mean effect, and what it does to sensitivity and specificity."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.stats import binomtest, wilcoxon

from eosin.errors import ConfigError
from eosin.heatmaps.counterfactual import Effect

Interval = tuple[float, float]
RESAMPLES = 2000


@dataclass(frozen=True)
class CohortEffect:
    """One intervention over a cohort.

    Parameters
    ----------
    kind, what : str
        Of the interventions.
    n_slides, n_patients : int
    change : float
        Mean change of the log-odds.
    interval : (float, float)
        95 % bootstrap interval of it, drawing patients.
    p : float
        Wilcoxon's signed-rank test, two-sided, of the patients' mean changes against zero.
    change_over_random : float or None
        Mean of the change minus that of random sets of as many tiles.
    interval_over_random : (float, float) or None
    sensitivity, specificity : (float, float)
        Before and after, class predicted where the log-odds are positive; NaN without slides of that truth.
    p_turned : float
        Exact McNemar test that predictions turn from right to wrong as often as from wrong to right.
    sensitivity_change, specificity_change : (float, float)
        95 % bootstrap intervals of after minus before, drawing patients.
    effect_size : float
        Mean over standard deviation of the patients' mean changes (Cohen's d of paired differences).
    p_over_random : float or None
        Wilcoxon's test of the patients' mean changes over those of random sets.
    """

    kind: str
    what: str
    n_slides: int
    n_patients: int
    change: float
    interval: Interval
    p: float
    change_over_random: float | None
    interval_over_random: Interval | None
    sensitivity: Interval
    specificity: Interval
    p_turned: float
    sensitivity_change: Interval = (float("nan"), float("nan"))
    specificity_change: Interval = (float("nan"), float("nan"))
    effect_size: float = float("nan")
    p_over_random: float | None = None


def summarise_cohort(
    effects: Sequence[Effect], truth: Sequence[bool] | None, patients: Sequence[str], *, seed: int = 0
) -> CohortEffect:
    """Summarise one intervention, done on each slide of a cohort.

    Parameters
    ----------
    effects : sequence of Effect
        One per slide, all of the same kind and tiles.
    truth : sequence of bool
        Whether the slide is of the class that the log-odds are about; None when it is not known, which leaves
        sensitivity and specificity out.
    patients : sequence of str
        Patient of each slide; slides of a patient are not independent observations.
    seed : int
        Of the bootstrap.

    Raises
    ------
    ConfigError
        If the lengths differ, there are no slides, or the effects are of different interventions.
    """
    counts = {len(effects), len(patients)} | (set() if truth is None else {len(truth)})
    if not effects or len(counts) > 1:
        raise ConfigError(f"{len(effects)} effects, their truths and {len(patients)} patients do not match in number")
    if len({(effect.kind, effect.origin, effect.what) for effect in effects}) > 1:
        raise ConfigError("the effects of a cohort must come from one intervention")
    changes = np.array([effect.change for effect in effects])
    means = _patient_means(changes, patients)
    over_random = _over_random(effects)
    said = np.array([[effect.before > 0, effect.after > 0] for effect in effects])
    is_class = np.zeros(0, dtype=bool) if truth is None else np.asarray(truth, dtype=bool)
    positive, negative = (np.flatnonzero(chosen) for chosen in (is_class, ~is_class))
    right = said[: len(is_class)] == is_class[:, None]
    return CohortEffect(
        kind=effects[0].kind,
        what=effects[0].what,
        n_slides=len(effects),
        n_patients=len(means),
        change=float(changes.mean()),
        interval=_bootstrap(changes, patients, seed),
        p=_signed_rank(means),
        change_over_random=None if over_random is None else float(over_random.mean()),
        interval_over_random=None if over_random is None else _bootstrap(over_random, patients, seed),
        sensitivity=_share(right[positive]),
        specificity=_share(right[negative]),
        p_turned=_turned(right),
        sensitivity_change=_gained(right, positive, patients, seed),
        specificity_change=_gained(right, negative, patients, seed),
        effect_size=float(means.mean() / means.std(ddof=1)) if len(means) > 1 and np.ptp(means) else float("nan"),
        p_over_random=None if over_random is None else _signed_rank(_patient_means(over_random, patients)),
    )


def _patient_means(values: NDArray[np.float64], patients: Sequence[str]) -> NDArray[np.float64]:
    return np.asarray(pd.Series(values).groupby(list(patients)).mean().to_numpy())


def _gained(right: NDArray[np.bool_], slides: NDArray[np.int64], patients: Sequence[str], seed: int) -> Interval:
    """Return the interval of the change of the share that is right, among some slides."""
    if not len(slides):
        return float("nan"), float("nan")
    change = right[slides, 1].astype(np.float64) - right[slides, 0]
    return _bootstrap(change, [patients[slide] for slide in slides], seed)


def _over_random(effects: Sequence[Effect]) -> NDArray[np.float64] | None:
    controls = [effect.control_mean for effect in effects]
    if any(value is None for value in controls):
        return None
    return np.array([effect.after for effect in effects]) - np.array(controls, dtype=np.float64)


def _bootstrap(values: NDArray[np.float64], patients: Sequence[str], seed: int) -> Interval:
    groups = pd.Series(values).groupby(list(patients)).agg(["sum", "count"]).to_numpy()
    drawn = np.random.default_rng(seed).integers(len(groups), size=(RESAMPLES, len(groups)))
    total, count = groups[drawn].sum(axis=1).T
    low, high = np.quantile(total / count, [0.025, 0.975])
    return float(low), float(high)


def _signed_rank(means: NDArray[np.float64]) -> float:
    return float(wilcoxon(means).pvalue) if np.any(means != 0) else 1.0


def _share(right: NDArray[np.bool_]) -> Interval:
    if not len(right):
        return float("nan"), float("nan")
    before, after = right.mean(axis=0).tolist()
    return before, after


def _turned(right: NDArray[np.bool_]) -> float:
    lost, won = int((right[:, 0] & ~right[:, 1]).sum()), int((~right[:, 0] & right[:, 1]).sum())
    return float(binomtest(lost, lost + won).pvalue) if lost + won else 1.0
