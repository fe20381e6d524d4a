"""Predictions for many bags, and metrics with confidence intervals that know of patients."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import stats

from eosin.mil.bags import PackedBags
from eosin.mil.data import BagSource
from eosin.mil.feed import EVALUATION_INSTANCES, EvaluationPacks
from eosin.mil.metrics import Floats, Metrics
from eosin.mil.slots import Aggregator
from eosin.mil.tasks import Task

RESAMPLES = 1000
LEVEL = 0.95


@torch.no_grad()
def compute_logits(model: Aggregator, packs: Iterable[PackedBags]) -> torch.Tensor:
    """Return the logits (B, K) of all bags of the packs, on the host; sets the model to evaluation mode."""
    model.eval()
    rows = [model(pack).logits for pack in packs]
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
        compute_logits(model.to(place), EvaluationPacks(bags, ids, place, most_instances=most_instances))
    )


@dataclass(frozen=True)
class Estimate:
    """A metric and its confidence interval; None where it is undefined.

    Attributes
    ----------
    value, lower, upper : float or None
    n_defined : int
        Resamples in which the metric is defined.
    """

    value: float | None
    lower: float | None
    upper: float | None
    n_defined: int

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
    """Return every metric with the percentile interval of a bootstrap that draws patients with all their rows.

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
        The interval is None when less than half of the draws define the metric. That of the calibration error is moved
        by what its draws are too large on average: the gaps of a sample that repeats patients cancel less.
    """
    decisions = task.decide(outputs) if decided is None else decided

    def measure(rows: NDArray[np.int64]) -> Metrics:
        of_rows = None if folds is None else folds[rows]
        return task.metrics(outputs[rows], targets[rows], decisions[rows], folds=of_rows)

    values = measure(np.arange(len(outputs)))
    draws = [measure(rows) for rows in patient_draws(patients, resamples, seed)]
    return {name: _estimate(name, value, [draw.get(name) for draw in draws], level) for name, value in values.items()}


def patient_draws(patients: Sequence[str], resamples: int, seed: int) -> Iterable[NDArray[np.int64]]:
    """Yield the rows of each bootstrap draw: as many patients as there are, with replacement, each with all rows."""
    names, number = np.unique(np.asarray(patients), return_inverse=True)
    order = np.argsort(number, kind="stable")
    starts = np.append(np.searchsorted(number[order], np.arange(len(names))), len(order))
    rng = np.random.default_rng(seed)
    for _ in range(resamples):
        drawn = rng.integers(len(names), size=len(names))
        yield np.concatenate([order[starts[patient] : starts[patient + 1]] for patient in drawn])


def _estimate(name: str, value: float | None, draws: list[float | None], level: float) -> Estimate:
    known = [draw for draw in draws if draw is not None]
    if value is None or 2 * len(known) < len(draws):
        return Estimate(value, None, None, len(known))
    tail = (1 - level) / 2
    lower, upper = np.quantile(known, [tail, 1 - tail])
    if f"_{name}".endswith("_ece"):
        bias = np.mean(known) - value
        lower, upper = max(lower - bias, 0.0), upper - bias
    return Estimate(value, float(lower), float(upper), len(known))


def summarise_folds(folds: Sequence[Metrics], *, level: float = LEVEL) -> dict[str, dict[str, Any]]:
    """Return each metric over folds: mean, standard deviation, standard error, interval of the mean, number of folds.

    A fold in which a metric is undefined does not count. The interval is Student's and takes folds as independent,
    which they are only nearly; the bootstrap over patients does not.
    """
    names = dict.fromkeys(name for fold in folds for name in fold)
    return {
        name: _over_folds([value for fold in folds if (value := fold.get(name)) is not None], level) for name in names
    }


def _over_folds(values: list[float], level: float) -> dict[str, Any]:
    n_folds = len(values)
    if not n_folds:
        return {"mean": None, "standard_deviation": None, "standard_error": None, "interval": None, "n_folds": 0}
    mean = float(np.mean(values))
    if n_folds == 1:
        return {"mean": mean, "standard_deviation": None, "standard_error": None, "interval": None, "n_folds": 1}
    deviation = float(np.std(values, ddof=1))
    error = deviation / np.sqrt(n_folds)
    half = float(stats.t.ppf((1 + level) / 2, n_folds - 1) * error)
    return {
        "mean": mean,
        "standard_deviation": deviation,
        "standard_error": float(error),
        "interval": [mean - half, mean + half],
        "n_folds": n_folds,
    }
