"""Metrics of predictions, in numpy; one that the data do not define is None, never a neutral number.

All follow scikit-learn's definitions where it has them; they are written here because a bootstrap calls them thousands
of times.
"""

import numpy as np
import scipy
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Metrics = dict[str, float | None]

RATES = (
    "accuracy", "auc", "average_precision", "balanced_accuracy", "cindex", "cindex_ipcw", "ece", "f1",
    "integrated_brier", "sensitivity", "specificity", "time_auc",
)  # fmt: skip
ERRORS = ("brier", "log_loss", "mean_absolute_error", "rmse")
CORRELATIONS = ("kappa", "quadratic_kappa", "pearson", "spearman")
RANGES = (
    dict.fromkeys(RATES, (0.0, 1.0))
    | dict.fromkeys(ERRORS, (0.0, np.inf))
    | dict.fromkeys(CORRELATIONS, (-1.0, 1.0))
    | {"r2": (-np.inf, 1.0)}
)
ECE_BINS = 10
EVEN = 0.5


def base_metric(name: str) -> str | None:
    """Return the metric of a name without the class or target that it is of; None for one that is not known."""
    if name in RANGES:
        return name
    # `balanced_accuracy` ends with the name of another metric
    longest_first = sorted(RANGES, key=len, reverse=True)
    return next((metric for metric in longest_first if f"_{metric}_" in f"_{name}_"), None)


def value_range(name: str) -> tuple[float, float]:
    """Return the least and the largest value that a metric can have."""
    base = base_metric(name)
    return (-np.inf, np.inf) if base is None else RANGES[base]


def roc_auc(scores: Floats, positive: NDArray[np.bool_]) -> float | None:
    """Return the area under the ROC curve, ties counted one half; None unless both kinds are there.

    Parameters
    ----------
    scores : (n,) float
        Higher is more positive.
    positive : (n,) bool
    """
    n_positive = int(positive.sum())
    n_negative = len(positive) - n_positive
    if not n_positive or not n_negative:
        return None
    rank_sum = float(scipy.stats.rankdata(scores)[positive].sum())
    return (rank_sum - n_positive * (n_positive + 1) / 2) / (n_positive * n_negative)


def average_precision(scores: Floats, positive: NDArray[np.bool_]) -> float | None:
    """Return Σ (recall step · precision) over the distinct thresholds; None unless both kinds are there."""
    if not positive.any() or positive.all():
        return None
    order = np.argsort(-scores, kind="stable")
    # no threshold lies between equal scores
    last_of_tie = np.append(np.diff(scores[order]) != 0, True)
    hits = np.cumsum(positive[order])[last_of_tie]
    seen = (np.arange(len(scores)) + 1)[last_of_tie]
    return float((np.diff(hits, prepend=0) * hits / seen).sum() / positive.sum())


def confusion(truth: Ints, predicted: Ints, n_classes: int) -> Ints:
    """Return counts, (classes, classes): rows are the truth, columns the prediction."""
    return np.bincount(truth * n_classes + predicted, minlength=n_classes**2).reshape(n_classes, n_classes)


def balanced_accuracy(matrix: Ints) -> float | None:
    """Return the mean recall of the classes; None when a class has no example."""
    support = matrix.sum(1)
    return float(np.mean(matrix.diagonal() / support)) if support.all() else None


def recalls(matrix: Ints) -> list[float | None]:
    """Return the share of each class that is predicted right; None for a class without an example."""
    return [
        int(right) / int(all_) if all_ else None for right, all_ in zip(matrix.diagonal(), matrix.sum(1), strict=True)
    ]


def f1_macro(matrix: Ints) -> float | None:
    """Return the mean F1 of the classes; None when a class has no example."""
    if not matrix.sum(1).all():
        return None
    return float(np.mean(2 * matrix.diagonal() / (matrix.sum(0) + matrix.sum(1))))


def kappa(matrix: Ints, *, quadratic: bool = False) -> float | None:
    """Return Cohen's kappa, with quadratic weights for ordered classes; None when chance alone agrees fully."""
    classes = np.arange(len(matrix))
    weights = (classes[:, None] - classes) ** 2 if quadratic else classes[:, None] != classes
    chance = np.outer(matrix.sum(1), matrix.sum(0)) / max(matrix.sum(), 1)
    expected = float((weights * chance).sum())
    return 1 - float((weights * matrix).sum()) / expected if expected else None


def expected_calibration_error(confidence: Floats, correct: NDArray[np.bool_], *, bins: int = ECE_BINS) -> float:
    """Return the mean gap between confidence and accuracy over equal-width bins, weighted by their counts."""
    # a confidence of 1 belongs to the last bin
    place = np.minimum((confidence * bins).astype(np.int64), bins - 1)
    gaps = np.bincount(place, weights=confidence - correct, minlength=bins)
    return float(np.abs(gaps).sum() / len(confidence))


def calibration_curve(confidence: Floats, correct: NDArray[np.bool_], *, bins: int = ECE_BINS) -> Floats:
    """Return the calibration curve over equal-width bins.

    Returns
    -------
    (filled bins, 3) float
        Mean confidence, fraction correct, and count of each bin that is not empty.
    """
    place = np.minimum((confidence * bins).astype(np.int64), bins - 1)
    counts = np.bincount(place, minlength=bins)
    sums = [np.bincount(place, weights=values, minlength=bins) for values in (confidence, correct.astype(np.float64))]
    filled = counts > 0
    return np.stack([sums[0][filled] / counts[filled], sums[1][filled] / counts[filled], counts[filled]], 1)


def best_threshold(scores: Floats, positive: NDArray[np.bool_]) -> float:
    """Return the threshold, halfway between two scores, with the highest balanced accuracy (Youden's index).

    Of equally good thresholds the middle one is returned, for a small part has many; one half where none is better than
    to predict all alike.
    """
    ordered = np.unique(scores)
    between = np.concatenate([[0.0], (ordered[1:] + ordered[:-1]) / 2, [1.0]])
    above = scores[None, :] >= between[:, None]  # (thresholds, n)
    index = above[:, positive].mean(1) - above[:, ~positive].mean(1)
    if index.max() <= 0:
        return EVEN
    best = between[np.isclose(index, index.max())]
    return float(best[(len(best) - 1) // 2])


def classification_metrics(probabilities: Floats, truth: Ints, predicted: Ints, classes: tuple[str, ...]) -> Metrics:
    """Return all metrics of single-label predictions.

    Parameters
    ----------
    probabilities : (n, classes) float
    truth, predicted : (n,) int
        Class numbers.
    classes : tuple of str
        Names; two classes are scored by the second, more by the mean over one class against the others.

    Returns
    -------
    dict
        accuracy, balanced_accuracy, f1, kappa, auc, average_precision, log_loss, brier, ece; sensitivity and
        specificity of two classes, the second being the positive one; ``auc_<class>`` of each of three or more. As in
        scikit-learn, the Brier score is that of the second of two classes, and the sum over three or more.
    """
    matrix = confusion(truth, predicted, len(classes))
    one_hot = truth[:, None] == np.arange(len(classes))
    scored = range(1, 2) if len(classes) == 2 else range(len(classes))
    areas = [roc_auc(probabilities[:, k], one_hot[:, k]) for k in scored]
    precisions = [average_precision(probabilities[:, k], one_hot[:, k]) for k in scored]
    # one slide at probability 0 would make the loss of a cohort infinite
    likelihood = np.clip(probabilities[np.arange(len(truth)), truth], 1e-12, None)
    top = probabilities.argmax(1)
    metrics: Metrics = {
        "accuracy": float(np.mean(predicted == truth)),
        "balanced_accuracy": balanced_accuracy(matrix),
        "f1": f1_macro(matrix),
        "kappa": kappa(matrix),
        "auc": mean_if_defined(areas),
        "average_precision": mean_if_defined(precisions),
        "log_loss": float(-np.log(likelihood).mean()),
        "brier": float(((probabilities - one_hot) ** 2).sum(1).mean()) / (2 if len(classes) == 2 else 1),
        "ece": expected_calibration_error(probabilities.max(1), top == truth),
    }
    if len(classes) > 2:
        return metrics | {f"auc_{name}": area for name, area in zip(classes, areas, strict=True)}
    specificity, sensitivity = recalls(matrix)
    return metrics | {"sensitivity": sensitivity, "specificity": specificity}


def mean_if_defined(values: list[float | None]) -> float | None:
    """Return the mean; None when any value is undefined."""
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known and len(known) == len(values) else None
