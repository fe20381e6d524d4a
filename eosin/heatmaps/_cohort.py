"""The same intervention on many slides: its mean effect, and what it does to sensitivity and specificity.

Everything is by patient: means are over patients of the means over their slides, and tests turn the sign of whole
patients. A p value against "no change" is given only for tiles that were chosen outside the model. Tiles that the model
itself chose, by attention or by a search for what changes its prediction, change the prediction of any model, also of
one with random weights; such sets are judged beside models with shuffled weights (`p_shuffled`).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import scipy
from numpy.typing import NDArray

from eosin.errors import ConfigError
from eosin.heatmaps._counterfactual import Effect
from eosin.mil._intervals import Clusters, Support, difference_interval, score_interval

Interval = tuple[float, float]
Floats = NDArray[np.float64]
RESAMPLES = 2000
LEVEL = 0.95
UNKNOWN: Interval = (float("nan"), float("nan"))


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
        95 % interval of it over patients, Student's; NaN of a single patient.
    p : float or None
        Wilcoxon's signed-rank test, two-sided, of the patients' mean changes against zero; None for tiles that the
        model chose.
    change_over_random : float or None
        Mean of the change minus that of random sets of as many tiles.
    interval_over_random : (float, float) or None
    sensitivity, specificity : (float, float)
        Before and after, class predicted where the log-odds are positive; NaN without slides of that truth.
    p_turned : float or None
        That predictions turn from right to wrong as often as from wrong to right: exact, turning the signs of whole
        patients, which is McNemar's test with one slide per patient; None for tiles that the model chose: where one
        class is more frequent, a model that calls all slides by it loses more than it wins whatever it knows.
    sensitivity_change, specificity_change : (float, float)
        95 % intervals of after minus before.
    effect_size : float
        Mean over standard deviation of the patients' mean changes (Cohen's d of paired differences).
    p_over_random : float or None
        Wilcoxon's test of the patients' mean changes over those of random sets; None as `p`.
    p_shuffled : float or None
        Share of models with shuffled weights, this one counted among them, whose mean change is at least as far from
        zero when they are asked the same, searches repeated; None when none were asked.
    n_seen : int
        Slides that trained or chose the model, or whose patient did: on these it looks better than it is.
    n_unknown : int
        Slides of which the model does not say so.
    """

    kind: str
    what: str
    n_slides: int
    n_patients: int
    change: float
    interval: Interval
    p: float | None
    change_over_random: float | None
    interval_over_random: Interval | None
    sensitivity: Interval
    specificity: Interval
    p_turned: float | None
    sensitivity_change: Interval = UNKNOWN
    specificity_change: Interval = UNKNOWN
    effect_size: float = float("nan")
    p_over_random: float | None = None
    p_shuffled: float | None = None
    n_seen: int = 0
    n_unknown: int = 0

    @property
    def seen_words(self) -> str:
        """How many of the slides are not new to the model, in words; empty when all are."""
        said = [f"{self.n_seen} of {self.n_slides} slides seen in training"] * bool(self.n_seen)
        said += [f"{self.n_unknown} of {self.n_slides} slides perhaps seen in training"] * bool(self.n_unknown)
        return ", ".join(said)


def summarise_cohort(
    effects: Sequence[Effect],
    truth: Sequence[bool] | None,
    patients: Sequence[str],
    *,
    shuffled: Sequence[float] = (),
    seed: int = 0,
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
        Patient of each slide; slides of a patient count as one observation.
    shuffled : sequence of float
        Mean change of each model with shuffled weights, as `mean_change` gives it.
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
        raise ConfigError("the effects of a cohort must all come from the same intervention")
    first = effects[0]
    means = _patient_means(np.array([effect.change for effect in effects]), patients)
    over_random = _over_random(effects, patients)
    said = np.array([[effect.before > 0, effect.after > 0] for effect in effects])
    is_class = np.zeros(0, dtype=bool) if truth is None else np.asarray(truth, dtype=bool)
    right = said[: len(is_class)] == is_class[:, None]
    sensitivity, sensitivity_change = _rates(right, np.flatnonzero(is_class), patients, seed)
    specificity, specificity_change = _rates(right, np.flatnonzero(~is_class), patients, seed)
    is_given = first.origin.is_given
    change = float(means.mean())
    return CohortEffect(
        kind=first.kind,
        what=first.what,
        n_slides=len(effects),
        n_patients=len(means),
        change=change,
        interval=_student(means),
        p=_signed_rank(means) if is_given else None,
        change_over_random=None if over_random is None else float(over_random.mean()),
        interval_over_random=None if over_random is None else _student(over_random),
        sensitivity=sensitivity,
        specificity=specificity,
        p_turned=_turned(right, patients[: len(right)]) if is_given else None,
        sensitivity_change=sensitivity_change,
        specificity_change=specificity_change,
        effect_size=change / float(means.std(ddof=1)) if len(means) > 1 and np.ptp(means) else float("nan"),
        p_over_random=_signed_rank(over_random) if is_given and over_random is not None else None,
        p_shuffled=_rank(change, shuffled),
    )


def mean_change(effects: Sequence[Effect], patients: Sequence[str]) -> float:
    """Return the mean over patients of the mean change of their slides; 0 without slides."""
    return float(_patient_means(np.array([e.change for e in effects]), patients).mean()) if effects else 0.0


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Return p values adjusted for their number (Holm, 1979): the share of families with a false alarm stays below p.

    Parameters
    ----------
    p_values : sequence of float or None
        None stands for a test that was not made, and does not count.
    """
    known = sorted((value, place) for place, value in enumerate(p_values) if value is not None)
    adjusted: list[float | None] = [None] * len(p_values)
    highest = 0.0
    for rank, (value, place) in enumerate(known):
        highest = max(highest, min((len(known) - rank) * value, 1.0))
        adjusted[place] = highest
    return adjusted


def _rank(change: float, shuffled: Sequence[float]) -> float | None:
    as_large = sum(abs(other) >= abs(change) for other in shuffled)
    return (1 + as_large) / (1 + len(shuffled)) if shuffled else None


def _patient_means(values: Floats, patients: Sequence[str]) -> Floats:
    _, patient, counts = np.unique(np.asarray(patients), return_inverse=True, return_counts=True)
    return np.bincount(patient, values) / counts


def _over_random(effects: Sequence[Effect], patients: Sequence[str]) -> Floats | None:
    """Return the patients' mean changes over those of random sets; None where there were none."""
    controls = [effect.control_mean for effect in effects]
    if any(value is None for value in controls):
        return None
    over = np.array([effect.after for effect in effects]) - np.array(controls, dtype=np.float64)
    return _patient_means(over, patients)


def _student(means: Floats) -> Interval:
    """Return the 95 % interval of the mean of some patients."""
    if len(means) < 2:
        return UNKNOWN
    half = float(scipy.stats.t.ppf((1 + LEVEL) / 2, len(means) - 1) * means.std(ddof=1) / np.sqrt(len(means)))
    return float(means.mean()) - half, float(means.mean()) + half


def _signed_rank(means: Floats) -> float:
    return float(scipy.stats.wilcoxon(means).pvalue) if np.any(means != 0) else 1.0


def _rates(
    right: NDArray[np.bool_], slides: NDArray[np.int64], patients: Sequence[str], seed: int
) -> tuple[Interval, Interval]:
    """Return the patients' mean share that is right before and after, and the interval of the change."""
    if not len(slides):
        return UNKNOWN, UNKNOWN
    of_slides = [patients[slide] for slide in slides]
    shares = np.stack([_patient_means(right[slides, k].astype(np.float64), of_slides) for k in (0, 1)], 1)
    n = len(shares)
    drawn = np.random.default_rng(seed).integers(n, size=(RESAMPLES, n))
    draws = shares[drawn].mean(1)  # (resamples, 2)
    everyone = Clusters(np.arange(n), np.zeros(n))
    whole = Support((np.ones(n, dtype=bool),))
    before, after = shares.mean(0).tolist()
    ends = [score_interval(value, draws[:, k], whole, everyone, level=LEVEL) for k, value in enumerate((before, after))]
    varies = bool(np.all(shares.std(0) > 0))
    together = float(np.corrcoef(shares[:, 0], shares[:, 1])[0, 1]) if varies else 0.0
    low, high = difference_interval(after, before, ends[1], ends[0], together)
    return (before, after), (max(low, -1.0), min(high, 1.0))


def _turned(right: NDArray[np.bool_], patients: Sequence[str] | None = None) -> float:
    """Return the exact two-sided p value of the sum over patients of slides lost minus slides won, signs turned.

    Without `patients` every slide is a patient of its own, which is McNemar's exact test.
    """
    if not len(right):
        return 1.0
    lost = right[:, 0].astype(np.int64) - right[:, 1]
    whose = np.arange(len(right)) if patients is None else np.unique(np.asarray(patients), return_inverse=True)[1]
    sums = np.abs(np.bincount(whose, lost)).astype(np.int64)
    observed = abs(int(lost.sum()))
    chances = np.ones(1)  # of each sum from -reach to reach
    for step in sums[sums > 0]:
        moved = np.zeros(len(chances) + 2 * step)
        moved[: len(chances)] += chances / 2
        moved[2 * step :] += chances / 2
        chances = moved
    reach = len(chances) // 2
    return float(min(chances[np.abs(np.arange(-reach, reach + 1)) >= observed].sum(), 1.0))
