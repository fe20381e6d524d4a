"""Predictions for many bags, and metrics with confidence intervals that know of patients."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import scipy
import torch
from numpy.typing import NDArray

from eosin._processes import require_running
from eosin.mil._data import BagSource
from eosin.mil._feed import EVALUATION_INSTANCES, EvaluationPacks
from eosin.mil._intervals import Clusters, Support, score_interval
from eosin.mil._metrics import Floats, Metrics, value_range
from eosin.mil.bags import BagInPieces, PackedBags
from eosin.mil.slots import Aggregator
from eosin.mil.task import Task

RESAMPLES = 1000
LEVEL = 0.95


@torch.no_grad()
def compute_logits(model: Aggregator, packs: Iterable[PackedBags | BagInPieces]) -> torch.Tensor:
    """Return the logits (B, K) of all bags of the packs, on the host; sets the model to evaluation mode."""
    model.eval()
    rows = []
    for pack in packs:
        require_running()
        output = model.forward_pieces(pack) if isinstance(pack, BagInPieces) else model(pack)
        rows.append(output.logits)
    return torch.cat(rows).cpu()


def predict_outputs(
    model: Aggregator,
    task: Task,
    bags: BagSource,
    ids: Sequence[str],
    *,
    device: torch.device | None = None,
    most_instances: int = EVALUATION_INSTANCES,
) -> Floats:
    """Return what a model says of bags.

    Parameters
    ----------
    model : Aggregator
        Is moved to the device.
    task : Task
    bags : BagSource
    ids : sequence of str
    device : torch.device, optional
        The CPU when not given.
    most_instances : int
        Computed at once; a larger bag is computed alone.

    Returns
    -------
    (len(ids), outputs) float64
        Activated outputs, see `Task.activate`.
    """
    place = device or torch.device("cpu")
    if not ids:
        return task.activate(torch.zeros(0, model.n_outputs))
    return task.activate(
        compute_logits(
            model.to(place),
            EvaluationPacks(bags, ids, place, most_instances=most_instances, places=model.reads_places),
        )
    )


@dataclass(frozen=True)
class Estimate:
    """A metric and its confidence interval; None where it is undefined.

    Attributes
    ----------
    value, lower, upper : float or None
    n_defined : int
        Resamples in which the metric is defined.
    n_effective : float or None
        Independent cases that the interval is worth; None where it is one of percentiles.
    """

    value: float | None
    lower: float | None
    upper: float | None
    n_defined: int
    n_effective: float | None = None

    def as_json(self) -> dict[str, Any]:
        """Return a dict."""
        return asdict(self)


def bootstrap(
    task: Task,
    outputs: Floats,
    targets: NDArray[Any],
    patients: Sequence[str],
    *,
    decided: NDArray[np.int64] | None = None,
    folds: NDArray[np.int64] | None = None,
    resamples: int = RESAMPLES,
    level: float = LEVEL,
    seed: int = 0,
) -> dict[str, Estimate]:
    """Return every metric with an interval that knows of patients.

    Bounded measures (rates, areas, concordance, agreement) have the interval of `eosin.mil._intervals`; the others have
    percentiles of a bootstrap that draws patients with all their rows.

    Parameters
    ----------
    task : Task
    outputs : (n, outputs) float
        Activated outputs.
    targets : (n, ...) array
        As the task encodes them.
    patients : sequence of str
        Patient of each row.
    decided : (n, ...) int, optional
        Decisions that were made already, see `Task.metrics`.
    folds : (n,) int, optional
        Fold of each row, see `Task.metrics`.
    resamples, level, seed
        Number of draws, coverage of the interval, seed of the draws.

    Returns
    -------
    dict of str to Estimate
        A percentile interval is None when less than half of the draws define the metric, or all draws are alike. That
        of the calibration error is moved by what its draws are too large on average: the gaps of a sample that repeats
        patients cancel less.
    """
    decisions = task.decide(outputs) if decided is None else decided

    def measure(rows: NDArray[np.int64]) -> Metrics:
        of_rows = None if folds is None else folds[rows]
        return task.metrics(outputs[rows], targets[rows], decisions[rows], folds=of_rows)

    values = measure(np.arange(len(outputs)))
    draws = [measure(rows) for rows in patient_draws(patients, resamples, seed)]
    known = {name: np.array([draw[name] for draw in draws if draw.get(name) is not None]) for name in values}
    clusters = Clusters.of(patients, task.surprise(outputs, targets, folds=folds))
    supports = task.supports(targets)
    return {
        name: _bounded(value, known[name], supports[name], clusters, level)
        if name in supports and value is not None
        else _percentiles(name, value, known[name], len(draws), level)
        for name, value in values.items()
    }


def _bounded(value: float, draws: Floats, support: Support, clusters: Clusters, level: float) -> Estimate:
    found = score_interval(value, draws, support, clusters, level=level)
    return Estimate(value, found.lower, found.upper, len(draws), found.n_effective)


def patient_draws(patients: Sequence[str], resamples: int, seed: int) -> Iterable[NDArray[np.int64]]:
    """Yield the rows of each bootstrap draw: as many patients as there are, with replacement, each with all rows."""
    names, number = np.unique(np.asarray(patients), return_inverse=True)
    order, sizes = np.argsort(number, kind="stable"), np.bincount(number)
    starts = np.cumsum(sizes) - sizes
    rng = np.random.default_rng(seed)
    for _ in range(resamples):
        require_running()
        drawn = rng.integers(len(names), size=len(names))
        lengths = sizes[drawn]
        first = np.repeat(starts[drawn] - (np.cumsum(lengths) - lengths), lengths)
        yield order[first + np.arange(len(first))]


def _percentiles(name: str, value: float | None, draws: Floats, resamples: int, level: float) -> Estimate:
    if value is None or 2 * len(draws) < resamples or not np.ptp(draws):
        return Estimate(value, None, None, len(draws))
    tail = (1 - level) / 2
    lower, upper = np.quantile(draws, [tail, 1 - tail])
    # that of each target, too
    if f"_{name}".endswith("_ece"):
        bias = np.mean(draws) - value
        lower, upper = max(lower - bias, 0.0), upper - bias
    # the draws of a value at the end of what is possible, 0 error or an R² of 0, lie on one side of it
    return Estimate(value, min(float(lower), value), max(float(upper), value), len(draws))


def summarise_folds(
    folds: Sequence[Metrics], *, level: float = LEVEL, test_per_train: float = 0.0
) -> dict[str, dict[str, Any]]:
    """Return each metric over folds: mean, standard deviation, standard error, interval of the mean, number of folds.

    A fold in which a metric is undefined does not count. Folds share training slides, and repeated ones test slides,
    too, so that their spread divided by their number is too small an error: the variance of the mean is
    ``s² (1 / k + test_per_train)`` (Nadeau and Bengio, Machine Learning 2003). The interval is Student's, cut at the
    ends of the metric's range; folds that are all alike have none.

    Parameters
    ----------
    folds : sequence of dict
    level : float
        Coverage of the interval.
    test_per_train : float
        Test slides per training slide of a fold; 0 takes folds for independent.
    """
    names = dict.fromkeys(name for fold in folds for name in fold)
    return {
        name: _over_folds(
            name, [value for fold in folds if (value := fold.get(name)) is not None], level, test_per_train
        )
        for name in names
    }


def _over_folds(name: str, values: list[float], level: float, test_per_train: float) -> dict[str, Any]:
    n_folds = len(values)
    mean = float(np.mean(values)) if values else None
    found = {"mean": mean, "standard_deviation": None, "standard_error": None, "interval": None, "n_folds": n_folds}
    if mean is None or n_folds == 1:
        return found
    deviation = float(np.std(values, ddof=1))
    error = deviation * float(np.sqrt(1 / n_folds + test_per_train))
    half = float(scipy.stats.t.ppf((1 + level) / 2, n_folds - 1) * error)
    lowest, highest = value_range(name)
    interval = [max(mean - half, lowest), min(mean + half, highest)] if np.ptp(values) else None
    return found | {"standard_deviation": deviation, "standard_error": error, "interval": interval}
