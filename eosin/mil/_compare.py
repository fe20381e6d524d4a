"""Two models on the same slides: is the difference more than chance?"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import scipy
from numpy.typing import NDArray

from eosin._tables import Table
from eosin.errors import LabelError
from eosin.mil._evaluate import LEVEL, RESAMPLES, patient_draws
from eosin.mil._intervals import Clusters, Support, difference_interval, score_interval
from eosin.mil._metrics import Floats, Metrics
from eosin.mil._tables import shown
from eosin.mil.task import Task


@dataclass(frozen=True)
class Difference:
    """A metric of two models and what separates them; None where it is undefined.

    Attributes
    ----------
    first, second, difference : float or None
        The metric of each, and first minus second.
    lower, upper : float or None
        Confidence interval of the difference.
    p_value : float or None
        Two-sided, for no difference.
    test : str
        How interval and p-value were found.
    """

    first: float | None
    second: float | None
    difference: float | None
    lower: float | None
    upper: float | None
    p_value: float | None
    test: str = "paired bootstrap"


def delong(first: Floats, second: Floats, positive: NDArray[np.bool_], *, level: float = LEVEL) -> Difference:
    """Compare two areas under the ROC curve of the same cases.

    DeLong, DeLong, Clarke-Pearson, Biometrics 1988, in the rank form of Sun and Xu, IEEE Signal Processing Letters
    2014. Cases are taken as independent: use `paired_bootstrap` for several slides per patient.

    Parameters
    ----------
    first, second : (n,) float
        Scores of the two models, higher is more positive.
    positive : (n,) bool
    level : float
        Coverage of the interval.
    """
    n_positive, n_negative = int(positive.sum()), int((~positive).sum())
    if not n_positive or not n_negative:
        return Difference(None, None, None, None, None, None, "DeLong")
    areas, v_positive, v_negative = zip(*(_placements(scores, positive) for scores in (first, second)), strict=True)
    difference = areas[0] - areas[1]
    variance = _variance(v_positive[0] - v_positive[1]) + _variance(v_negative[0] - v_negative[1])
    deviation = float(np.sqrt(variance))
    if not deviation:  # each case is placed alike, so that the data say nothing of chance
        return Difference(areas[0], areas[1], difference, None, None, 1.0 if not difference else None, "DeLong")
    half = float(scipy.stats.norm.ppf((1 + level) / 2)) * deviation
    lower, upper = max(difference - half, -1.0), min(difference + half, 1.0)
    p_value = float(2 * scipy.stats.norm.sf(abs(difference) / deviation))
    return Difference(areas[0], areas[1], difference, lower, upper, p_value, "DeLong")


def _placements(scores: Floats, positive: NDArray[np.bool_]) -> tuple[float, Floats, Floats]:
    """Return the area, and how each positive and each negative case stands among the others."""
    n_positive, n_negative = int(positive.sum()), int((~positive).sum())
    ranks = scipy.stats.rankdata(scores)
    among_negatives = (ranks[positive] - scipy.stats.rankdata(scores[positive])) / n_negative
    among_positives = 1 - (ranks[~positive] - scipy.stats.rankdata(scores[~positive])) / n_positive
    return float(among_negatives.mean()), among_negatives, among_positives


def _variance(placements: Floats) -> float:
    return float(placements.var(ddof=1) / len(placements)) if len(placements) > 1 else 0.0


def paired_bootstrap(
    task: Task,
    first: Floats,
    second: Floats,
    targets: NDArray[Any],
    patients: Sequence[str],
    *,
    decided: tuple[NDArray[np.int64], NDArray[np.int64]] | None = None,
    folds: tuple[NDArray[np.int64], NDArray[np.int64]] | None = None,
    resamples: int = RESAMPLES,
    level: float = LEVEL,
    seed: int = 0,
) -> dict[str, Difference]:
    """Compare every metric of two models by drawing the same patients for both.

    Parameters
    ----------
    task : Task
    first, second : (n, outputs) float
        Activated outputs of the two models for the same rows.
    targets : (n, ...) array
    patients : sequence of str
        Patient of each row; a patient is drawn with all rows.
    decided, folds : pair of (n, ...) int, optional
        Decisions and folds of the rows of each model, see `Task.metrics`.
    resamples, level, seed
        Number of draws, coverage, seed.

    Returns
    -------
    dict of str to Difference
        The p-value is twice the smaller share of draws on one side of zero, at least ``1 / (resamples + 1)``. The
        interval of a bounded measure comes from those of the two models, see `eosin.mil._intervals`.

    Raises
    ------
    LabelError
        If the two are not about the same rows.
    """
    if not len(first) == len(second) == len(targets) == len(patients):
        raise LabelError(
            f"{len(first)} and {len(second)} predictions for {len(targets)} slides; compare the same slides"
        )
    outputs = (first, second)
    decisions = decided or tuple(task.decide(model) for model in outputs)

    def measure(model: int, rows: NDArray[np.int64]) -> Metrics:
        of_rows = None if folds is None else folds[model][rows]
        return task.metrics(outputs[model][rows], targets[rows], decisions[model][rows], folds=of_rows)

    everyone = np.arange(len(targets))
    values = measure(0, everyone), measure(1, everyone)
    draws: dict[str, list[tuple[float, float]]] = {name: [] for name in values[0]}
    for rows in patient_draws(patients, resamples, seed):
        one, two = measure(0, rows), measure(1, rows)
        for name, drawn in draws.items():
            a, b = one[name], two[name]
            if a is not None and b is not None:
                drawn.append((a, b))
    supports = task.supports(targets)
    surprises = [
        task.surprise(outputs[model], targets, folds=None if folds is None else folds[model]) for model in (0, 1)
    ]
    clusters = [Clusters.of(patients, surprise) for surprise in surprises]
    found = {}
    for name in draws:
        pairs = np.reshape(draws[name], (-1, 2))
        plain = _difference(values[0][name], values[1][name], pairs, resamples, level)
        found[name] = _bounded(plain, pairs, supports[name], clusters, level) if name in supports else plain
    return found


def _difference(first: float | None, second: float | None, pairs: Floats, resamples: int, level: float) -> Difference:
    if first is None or second is None or 2 * len(pairs) < resamples:
        return Difference(first, second, None, None, None, None)
    drawn = pairs[:, 0] - pairs[:, 1]
    tail = (1 - level) / 2
    lower, upper = np.quantile(drawn, [tail, 1 - tail])
    side = min((drawn <= 0).mean(), (drawn >= 0).mean())
    p_value = min(max(2 * float(side), 1 / (resamples + 1)), 1.0)
    return Difference(first, second, first - second, float(lower), float(upper), p_value)


def _bounded(
    plain: Difference, pairs: Floats, support: Support, clusters: Sequence[Clusters], level: float
) -> Difference:
    """Return the comparison with an interval from those of the two measures, which keeps a width at their limits."""
    if plain.first is None or plain.second is None or plain.difference is None:
        return plain
    values = (plain.first, plain.second)
    own = [score_interval(values[k], pairs[:, k], support, clusters[k], level=level) for k in (0, 1)]
    together = float(np.corrcoef(pairs[:, 0], pairs[:, 1])[0, 1]) if np.all(pairs.std(0) > 0) else 0.0
    lower, upper = difference_interval(*values, own[0], own[1], together)
    return replace(plain, lower=lower, upper=upper)


def compare_predictions(task: Task, first: Table, second: Table) -> dict[str, Difference]:
    """Compare two tables of out-of-fold predictions on the slides that both hold.

    The p-value of the area under the ROC curve of two classes with one slide per patient is that of `delong`,
    everything else is compared by `paired_bootstrap`.

    Parameters
    ----------
    task : Task
    first, second : mapping of str to sequence of str
        ``predictions.csv`` of `eosin.mil._crossval.crossval`, as text.

    Returns
    -------
    dict of str to Difference
        One per measure.

    Raises
    ------
    LabelError
        If they are not about the same slides, patients and labels, or lack columns of the task.
    """
    needed = ["slide_id", "patient_id", *task.columns]
    rows = [_by_slide(table, needed) for table in (first, second)]
    _require_same(rows[0], rows[1])
    slides = list(rows[0])
    differs = [slide for slide in slides if any(rows[0][slide][name] != rows[1][slide][name] for name in needed)]
    if differs:
        raise LabelError(
            f"patient or label of {shown(differs)} differ between the two runs; compare runs with the same label table"
        )
    read = [_read(task, table, slides) for table in rows]
    targets = task.encode([rows[0][slide] for slide in slides]).numpy()
    patients = [rows[0][slide]["patient_id"] for slide in slides]
    (first_outputs, *first_rest), (second_outputs, *second_rest) = read
    decided, folds = zip(first_rest, second_rest, strict=True)
    found = paired_bootstrap(task, first_outputs, second_outputs, targets, patients, decided=decided, folds=folds)
    if len(getattr(task, "classes", ())) == 2 and len(set(patients)) == len(patients):
        exact = delong(first_outputs[:, 1], second_outputs[:, 1], targets == 1)
        if exact.p_value is not None:
            # the interval stays that of bounded measures, which has a width at 0 and 1
            found["auc"] = replace(exact, lower=found["auc"].lower, upper=found["auc"].upper)
    return found


def require_comparable(task: Task, slide_ids: Collection[str], other: Table) -> None:
    """Refuse the predictions of another run that `compare_predictions` could not use, before anything is trained.

    Parameters
    ----------
    task : Task
    slide_ids : collection of str
        What is going to be predicted.
    other : mapping of str to sequence of str

    Raises
    ------
    LabelError
        If they are of another task, or not of these slides.
    """
    table = _by_slide(other, ["slide_id", "patient_id", *task.columns])
    _require_same(slide_ids, table)
    _read(task, table, list(table))


def _require_same(first: Collection[str], second: Collection[str]) -> None:
    odd = sorted(set(first) ^ set(second))
    if odd:
        raise LabelError(f"only one of the two runs has predictions for {shown(odd)}; compare runs of the same slides")


def _read(
    task: Task, table: Mapping[str, Mapping[str, str]], slides: Sequence[str]
) -> tuple[Floats, NDArray[np.int64], NDArray[np.int64]]:
    """Return the outputs of some slides, what was decided and the number of the fold."""
    columns = {name: [table[slide][name] for slide in slides] for name in table[slides[0]]}
    try:
        folds = np.unique(columns["fold"], return_inverse=True)[1]
        return task.read_outputs(columns), task.read_decided(columns), folds
    except KeyError as error:
        raise LabelError(f"one run has no column {error} in its predictions; compare runs of the same task") from None


def _by_slide(table: Table, needed: Sequence[str]) -> dict[str, dict[str, str]]:
    absent = [name for name in needed if name not in table]
    if absent:
        raise LabelError(f"predictions without the column {absent[0]!r}; compare runs of the same task")
    columns = list(table)
    rows = [dict(zip(columns, values, strict=True)) for values in zip(*table.values(), strict=True)]
    found = {row["slide_id"]: row for row in rows}
    if len(found) < len(rows):
        raise LabelError("a slide was tested more than once; compare runs that test each slide once")
    return found
