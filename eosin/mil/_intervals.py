"""Confidence intervals of bounded measures: they know of patients and stay true at the ends of a measure's range.

A percentile bootstrap of twenty patients that a model separates perfectly ends in [1, 1], because every draw is
perfect, too. Here a measure is treated as a share of cases that are right, out of as many *effective* cases as its
variance says, and gets Wilson's interval of that share (Wilson, JASA 1927). The variance is that of a bootstrap over
patients. Near 0 and 1 such a variance knows little; there it is drawn towards what the numbers of patients alone would
give, as if one more case were known. `benchmarks/coverage.py` measures how often such intervals hold the truth.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import scipy
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Flags = NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class Support:
    """What a bounded measure rests on.

    Attributes
    ----------
    groups : tuple of (n,) bool
        The rows that it is a mean over, or that it compares: the positive rows for sensitivity, positive and negative
        ones for the area under the ROC curve.
    low, high : float
        Ends of its range.
    """

    groups: tuple[Flags, ...]
    low: float = 0.0
    high: float = 1.0


@dataclass(frozen=True, eq=False)
class Clusters:
    """Rows of the same patient, and how alike they are.

    Attributes
    ----------
    numbers : (n,) int
        Number of the patient of each row.
    surprise : (n,) float
        How far each prediction is from the truth, see `Task.surprise`; rows of a patient that are wrong together count
        less than as many patients.
    """

    numbers: Ints
    surprise: Floats

    @classmethod
    def of(cls, patients: Sequence[str], surprise: Floats) -> "Clusters":
        """Number the patients of some rows."""
        return cls(np.unique(np.asarray(patients), return_inverse=True)[1], surprise)

    def effective(self, support: Support) -> tuple[float, float]:
        """Return how many independent cases a measure of these rows would have, and its degrees of freedom.

        Of groups with m₁, m₂, ... effective cases, a mean of g rates has g² / Σ 1/mᵢ; so has, close to 1, the area
        under the ROC curve (Hanley and McNeil, Radiology 1982, with exponential scores).
        """
        groups = [group for group in support.groups if group.any()]
        alike = self._likeness(groups)
        sizes = [np.bincount(self.numbers[group]) for group in groups]
        cases = [_cases(of_patient, alike) for of_patient in sizes]
        patients = _cases(np.bincount(self.numbers), 1.0)
        return len(cases) ** 2 / sum(1 / count for count in cases), max(patients - len(cases), 1.0)

    def _likeness(self, groups: Sequence[Flags]) -> float:
        """Return the intraclass correlation of the surprise within patients, each group about its own mean."""
        known = np.isfinite(self.surprise) & np.any(groups, axis=0)
        scores = np.full(len(known), np.nan)
        scores[known] = scipy.stats.norm.ppf((scipy.stats.rankdata(self.surprise[known]) - 0.5) / max(known.sum(), 1))
        left = known.copy()
        for group in groups:
            rows = group & left
            scores[rows] -= scores[rows].mean() if rows.any() else 0.0
            left &= ~rows
        return intraclass_correlation(scores[known], self.numbers[known])


def _cases(sizes: Ints, alike: float) -> float:
    """Return the effective number of cases of patients with so many rows each (Kish's design effect)."""
    filled = sizes[sizes > 0]
    return float(filled.sum() ** 2 / (filled * (1 + (filled - 1) * alike)).sum())


def intraclass_correlation(values: Floats, patients: Ints) -> float:
    """Return the correlation of two rows of one patient, from 0 to 1, by analysis of variance; 1 where it is unknown.

    Parameters
    ----------
    values : (n,) float
    patients : (n,) int
    """
    _, place, sizes = np.unique(patients, return_inverse=True, return_counts=True)
    n, groups = len(values), len(sizes)
    if groups < 2 or groups == n:
        return 1.0
    means = np.bincount(place, values) / sizes
    between = float((sizes * (means - values.mean()) ** 2).sum()) / (groups - 1)
    within = float(((values - means[place]) ** 2).sum()) / (n - groups)
    usual = (n - (sizes**2).sum() / n) / (groups - 1)
    total = between + (usual - 1) * within
    return float(np.clip((between - within) / total, 0, 1)) if total > 0 else 1.0


@dataclass(frozen=True)
class Interval:
    """Ends of an interval, and the number of independent cases that it is worth."""

    lower: float
    upper: float
    n_effective: float


def score_interval(value: float, draws: Floats, support: Support, clusters: Clusters, *, level: float) -> Interval:
    """Return the interval of a bounded measure.

    Parameters
    ----------
    value : float
        The measure.
    draws : (r,) float
        The measure in bootstrap draws of patients; may be few or none.
    support : Support
    clusters : Clusters
    level : float
        Coverage.
    """
    span = support.high - support.low
    share = float(np.clip((value - support.low) / span, 0, 1))
    cases, freedom = clusters.effective(support)
    patients = len(np.unique(clusters.numbers))
    # p patients drawn from p vary (p - 1) / p as much as p patients drawn from all
    variance = float(draws.var()) / span**2 * patients / max(patients - 1, 1) if len(draws) else 0.0
    if variance > 0:  # draws that are all alike say nothing of their variance
        cases = (share * (1 - share) + 1 / cases) / (variance + 1 / cases**2)
    lower, upper = wilson(share, cases, float(scipy.stats.t.ppf((1 + level) / 2, freedom)))
    return Interval(support.low + span * lower, support.low + span * upper, cases)


def wilson(share: float, cases: float, quantile: float) -> tuple[float, float]:
    """Return Wilson's interval of a share of so many cases; `quantile` is 1.96 for 95 % and many cases."""
    weight = quantile**2 / cases
    centre = (share + weight / 2) / (1 + weight)
    half = np.sqrt(weight * (share * (1 - share) + weight / 4)) / (1 + weight)
    return float(np.clip(centre - half, 0, share)), float(np.clip(centre + half, share, 1))


def difference_interval(
    first: float, second: float, of_first: Interval, of_second: Interval, correlation: float
) -> tuple[float, float]:
    """Return the interval of first minus second from those of each (Zou and Donner, Stat. Med. 2008).

    Parameters
    ----------
    first, second : float
    of_first, of_second : Interval
    correlation : float
        Of the two estimates.
    """

    def distance(one: float, other: float) -> float:
        return float(np.sqrt(max(one**2 + other**2 - 2 * correlation * one * other, 0.0)))

    difference = first - second
    below = distance(first - of_first.lower, of_second.upper - second)
    above = distance(of_first.upper - first, second - of_second.lower)
    return difference - below, difference + above
