"""Metrics of survival: concordance, discrimination at a time, error of survival curves, and the curves themselves.

Times of censored patients are not known, so patients whose event was seen stand for those who were censored before:
each is weighted by one over the probability G of not being censored until then (inverse probability of censoring).
"""

from collections.abc import Sequence
from functools import partial

import numpy as np
from numpy.typing import NDArray

from eosin.mil._metrics import Floats

TIED_RISK = 1e-8
BLOCK = 256

Flags = NDArray[np.bool_]
Groups = NDArray[np.int64]
Rows = NDArray[np.int64]


def kaplan_meier(time: Floats, event: Flags) -> tuple[Floats, Floats]:
    """Return the product-limit estimate of survival.

    Parameters
    ----------
    time : (n,) float
    event : (n,) bool
        True for an event, False for censored.

    Returns
    -------
    times : (steps,) float
        Distinct times, in order.
    survival : (steps,) float
        Probability of living longer than each.
    """
    times, index = np.unique(time, return_inverse=True)
    deaths = np.bincount(index, weights=event, minlength=len(times))
    leaving = np.bincount(index, minlength=len(times))
    at_risk = leaving[::-1].cumsum()[::-1]
    return times, np.cumprod(1 - deaths / at_risk)


def uncensored(time: Floats, event: Flags, at: Floats) -> Floats:
    """Return G, the probability of not being censored until each of some times; of equal times, events come first."""
    times, index = np.unique(time, return_inverse=True)
    deaths = np.bincount(index, weights=event, minlength=len(times))
    leaving = np.bincount(index, minlength=len(times))
    at_risk = leaving[::-1].cumsum()[::-1] - deaths
    lost = np.divide(leaving - deaths, at_risk, out=np.zeros(len(times)), where=at_risk > 0)
    return _step(times, np.cumprod(1 - lost), at)


def _step(times: Floats, values: Floats, at: Floats) -> Floats:
    """Return a step function that is 1 before its first time."""
    place = np.searchsorted(times, at, side="right")
    return np.asarray(np.append(1.0, values)[place])


def time_auc(risk: Floats, time: Floats, event: Flags, times: Floats, *, groups: Groups | None = None) -> float | None:
    """Return the mean cumulative/dynamic area under the ROC curve: does risk tell who has the event until t?

    At each t, patients with an event until t are weighted by 1 / G and compared with all who live longer; the mean over
    t is weighted by the fall of the survival curve (Uno et al., JASA 2007; Lambert and Chevret, 2016; scikit-survival's
    definition). None where a time has nobody on a side.

    Parameters
    ----------
    risk : (n,) float
        Higher for an earlier event.
    time : (n,) float
    event : (n,) bool
    times : (t,) float
    groups : (n,) int, optional
        Only patients of one group are compared with each other; the weights are those of all.
    """
    weights = _weights(time, event)
    members = _members(groups, len(risk))
    at = partial(_area_at, risk, time, event, weights=weights, members=members)
    areas = [area for moment in times if (area := at(moment=moment)) is not None]
    if not areas or len(areas) < len(times):
        return None
    survival = _step(*kaplan_meier(time, event), times)
    falls = -np.diff(np.append(1.0, survival))
    return float(np.dot(areas, falls) / falls.sum()) if falls.sum() > 0 else None


def _weights(time: Floats, event: Flags) -> Floats:
    kept = uncensored(time, event, time)
    return np.divide(event, kept, out=np.zeros(len(time)), where=kept > 0)


def _members(groups: Groups | None, n: int) -> list[Rows]:
    """Return the rows of each group; one group of all when there are none."""
    return [np.arange(n)] if groups is None else [np.flatnonzero(groups == group) for group in np.unique(groups)]


def _area_at(
    risk: Floats, time: Floats, event: Flags, *, weights: Floats, moment: float, members: Sequence[Rows]
) -> float | None:
    right = pairs = 0.0
    for rows in members:
        cases = rows[event[rows] & (time[rows] <= moment)]
        controls = np.sort(risk[rows[time[rows] > moment]])
        below = np.searchsorted(controls, risk[cases] - TIED_RISK, side="left")
        up_to = np.searchsorted(controls, risk[cases] + TIED_RISK, side="right")
        right += float((weights[cases] * (below + up_to) / 2).sum())
        pairs += float(weights[cases].sum()) * len(controls)
    return right / pairs if pairs else None


def integrated_brier(survival: Floats, time: Floats, event: Flags, times: Floats) -> float | None:
    """Return the mean squared error of survival curves over a span of time (Graf et al., Stat. Med. 1999).

    Parameters
    ----------
    survival : (n, t) float
        Predicted probability of living longer than each of `times`.
    time : (n,) float
    event : (n,) bool
    times : (t,) float
        At least two, in order; None otherwise, or when nobody is observed as long.
    """
    if len(times) < 2 or times[-1] >= time.max() or times[0] < time.min():
        return None
    weights, alive = _weights(time, event), uncensored(time, event, times)
    if (alive <= 0).any():
        return None
    dead = event[:, None] & (time[:, None] <= times)  # (n, t)
    living = time[:, None] > times
    errors = dead * survival**2 * weights[:, None] + living * (1 - survival) ** 2 / alive
    scores = errors.mean(0)
    return float(((scores[1:] + scores[:-1]) / 2 * np.diff(times)).sum() / (times[-1] - times[0]))


def log_rank(groups: NDArray[np.int64], time: Floats, event: Flags) -> float | None:
    """Return the chi-squared statistic of Mantel's log-rank test of two groups; None without an event or a group.

    Parameters
    ----------
    groups : (n,) int
        0 or 1.
    time : (n,) float
    event : (n,) bool
    """
    observed = expected = variance = 0.0
    for moment in np.unique(time[event]):
        at_risk, dying = time >= moment, event & (time == moment)
        n, n_one, d = int(at_risk.sum()), int((at_risk & (groups == 1)).sum()), int(dying.sum())
        observed += int((dying & (groups == 1)).sum())
        expected += d * n_one / n
        variance += d * n_one * (n - n_one) * (n - d) / (n**2 * (n - 1)) if n > 1 else 0.0
    return (observed - expected) ** 2 / variance if variance > 0 else None


def concordance(
    risk: Floats, time: Floats, event: Flags, *, tied: float = TIED_RISK, groups: Groups | None = None
) -> float | None:
    """Return Harrell's C: how often the higher risk has the earlier event; None when no pair can be compared.

    Pair (i, j) is compared when i has an event and j lives longer, or is censored at the same time. Risks that differ
    by at most `tied` count one half (scikit-survival's ``concordance_index_censored``). With `groups` (n,) only pairs
    within a group are compared: all such pairs of all groups together, as a stratified C-index does.
    """
    return _share_of_pairs(risk, time, event, weights=np.ones(len(risk)), tied=tied, groups=groups)


def concordance_ipcw(
    risk: Floats, time: Floats, event: Flags, *, tied: float = TIED_RISK, groups: Groups | None = None
) -> float | None:
    """Return Uno's C: each pair of `concordance` has the weight 1 / G² of the earlier event; None without a pair.

    Harrell's C depends on who is censored when; this one does not, as long as being censored has nothing to do with
    the risk (Uno et al., Stat. Med. 2011; scikit-survival's ``concordance_index_ipcw`` with the same patients for G).
    Events after the last time at which anybody is still observed have no weight.
    """
    return _share_of_pairs(risk, time, event, weights=_weights(time, event) ** 2, tied=tied, groups=groups)


def _share_of_pairs(
    risk: Floats, time: Floats, event: Flags, *, weights: Floats, tied: float, groups: Groups | None
) -> float | None:
    right = ties = pairs = 0.0
    for rows in _members(groups, len(risk)):
        counts = _count_pairs(risk[rows], time[rows], event[rows], weights[rows], tied)
        right, ties, pairs = right + counts[0], ties + counts[1], pairs + counts[2]
    return (right + 0.5 * ties) / pairs if pairs else None


def _count_pairs(risk: Floats, time: Floats, event: Flags, weights: Floats, tied: float) -> tuple[float, float, float]:
    """Return the weight of the pairs that have the higher risk first, are tied, and can be compared.

    In order of time, events before the censored of the same time, an event is compared with all that come after those
    like it. Blocks from the end, each against the sorted risks behind it, take n log n steps instead of n².
    """
    order = np.lexsort((~event, time))
    risk, time, event, weights = risk[order], time[order], event[order], weights[order]
    right = ties = pairs = 0.0
    behind = np.empty(0)
    for first, last, mixed in reversed(_blocks(time, event)):
        own, seen = slice(first, last), event[first:last]
        cases, weight = risk[own][seen], weights[own][seen]
        below = np.searchsorted(behind, cases - tied, side="left")
        up_to = np.searchsorted(behind, cases + tied, side="right")
        right += float((weight * below).sum())
        ties += float((weight * (up_to - below)).sum())
        pairs += float(weight.sum()) * len(behind)
        behind = np.sort(np.concatenate([behind, risk[own]]), kind="stable")
        if mixed:
            compared = _comparable(time[own], event[own]) * weights[own, None]
            difference = risk[own, None] - risk[own]
            right += float(compared[difference > tied].sum())
            ties += float(compared[np.abs(difference) <= tied].sum())
            pairs += float(compared.sum())
    return right, ties, pairs


def _blocks(time: Floats, event: Flags) -> list[tuple[int, int, bool]]:
    """Return the ends of blocks of rows in order, and whether a block holds several kinds of rows.

    Rows of one kind, of the same time and all events or all censored, are never in two blocks.
    """
    ends = np.append(np.flatnonzero((np.diff(time) != 0) | np.diff(event)) + 1, len(time)).tolist()
    blocks = [(0, ends[0], False)]
    for end in ends[1:]:
        first, last, _ = blocks[-1]
        if end - first > BLOCK:
            blocks.append((last, end, False))
        else:
            blocks[-1] = (first, end, True)
    return blocks


def _comparable(time: Floats, event: Flags, first: int = 0, last: int | None = None) -> NDArray[np.bool_]:
    """Return whether i, of the rows from `first` to `last`, is known to have its event before j, (rows, n)."""
    when, seen = time[first:last, None], event[first:last, None]
    return np.asarray(((time > when) | ((time == when) & ~event)) & seen)


def discordance(
    risk: Floats, time: Floats, event: Flags, *, tied: float = TIED_RISK, groups: Groups | None = None
) -> Floats:
    """Return, for each patient, the share of comparable pairs in which the risk is on the wrong side; NaN without one.

    Pairs, ties and groups as in `concordance`.
    """
    wrong, pairs = np.zeros(len(risk)), np.zeros(len(risk))
    for rows in _members(groups, len(risk)):
        for first in range(0, len(rows), BLOCK):
            own = rows[first : first + BLOCK]
            compared = _comparable(time[rows], event[rows], first, first + BLOCK)
            difference = risk[own, None] - risk[rows]
            faults = np.where(np.abs(difference) <= tied, 0.5, difference < 0) * compared
            for total, values in ((wrong, faults), (pairs, compared)):
                total[own] += values.sum(1)
                total[rows] += values.sum(0)
    shares: Floats = np.divide(wrong, pairs, out=np.full(len(risk), np.nan), where=pairs > 0)
    return shares
