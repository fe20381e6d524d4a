"""The tasks: what a label means. Nothing else in the package knows.

A task is a frozen options object, so a model folder stores it as JSON and builds it again.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, Self

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from scipy import optimize, stats
from torch import Tensor
from torch.nn import functional

from eosin.errors import ConfigError, LabelError, UnknownNameError
from eosin.mil.metrics import (
    Floats,
    Metrics,
    average_precision,
    best_threshold,
    classification_metrics,
    confusion,
    kappa,
    mean_if_defined,
    roc_auc,
)
from eosin.mil.survival import Cox, DiscreteSurvival
from eosin.mil.task import Columns as Columns
from eosin.mil.task import Row as Row
from eosin.mil.task import Task as Task
from eosin.mil.task import number, rank_bins, to_numpy
from eosin.mil.task import wide as wide

EVEN = 0.5


class _ClassTask(Task):
    """What single-label classification shares, whatever the number of logits."""

    selection_metric: ClassVar[str] = "auc"
    learnt: ClassVar[frozenset[str]] = frozenset({"threshold", "temperature"})
    classes: tuple[str, ...] = Field(min_length=2)
    target: str = "label"
    threshold: float | None = Field(default=None, ge=0, le=1)
    temperature: float = Field(default=1.0, gt=0)

    @classmethod
    def from_rows(cls, rows: Sequence[Row], target: str) -> Self:
        """Make the task whose classes are the values of a column, in order of number or text."""
        classes = sorted_labels({row[target] for row in rows})
        if len(classes) < 2:
            raise LabelError(
                f"column {target!r} has only the label {', '.join(classes)!r}; at least two classes are needed to train"
            )
        return cls._of(classes, target)

    @classmethod
    def _of(cls, classes: tuple[str, ...], target: str) -> Self:
        return cls(classes=classes, target=target)  # type: ignore[call-arg]

    @property
    def columns(self) -> tuple[str, ...]:
        """The label column."""
        return (self.target,)

    def encode(self, rows: Sequence[Row]) -> Tensor:
        """Return class numbers, (B,) int64."""
        return torch.tensor([self._number(row[self.target]) for row in rows], dtype=torch.int64)

    def decode(self, target: NDArray[Any]) -> list[NDArray[Any]]:
        """Return the names of the classes."""
        return [np.asarray(self.classes)[target]]

    def _number(self, value: str) -> int:
        if value not in self.classes:
            raise LabelError(
                f"{value!r} in column {self.target!r} is none of the classes {', '.join(self.classes)}; "
                "correct the label table"
            )
        return self.classes.index(value)

    def require_trainable(self, target: Tensor) -> None:
        """Refuse targets without an example of each class."""
        counts = target.bincount(minlength=len(self.classes)).tolist()
        absent = [name for name, count in zip(self.classes, counts, strict=True) if not count]
        if absent:
            raise LabelError(f"no training slide of class {', '.join(absent)}; use fewer folds, or leave the class out")

    def balance(self, target: Tensor) -> Tensor:
        """Return weights proportional to one over the count of the example's class."""
        counts = target.bincount(minlength=len(self.classes))
        weights = 1 / counts[target].double()
        return (weights / weights.mean()).float()

    def tuned(self, logits: Tensor, target: Tensor, *, threshold: bool = False, temperature: bool = False) -> Self:
        """Return the task with a temperature and, of two classes, a threshold from the validation part.

        The temperature divides the logits and minimises the loss (Guo et al., ICML 2017,
        https://arxiv.org/abs/1706.04599); the threshold on the probability of the second class has the highest balanced
        accuracy. Neither is changed by a validation part that lacks a class.
        """
        if threshold and len(self.classes) > 2:
            raise ConfigError("a threshold needs two classes; set training.threshold to false")
        if len(set(target.tolist())) < len(self.classes):
            return self
        result = self
        if temperature:
            result = result.model_copy(update={"temperature": self._best_temperature(logits, target)})
        if threshold:
            positive = result.activate(logits)[:, 1]
            result = result.model_copy(update={"threshold": best_threshold(positive, target.numpy() == 1)})
        return result

    def _best_temperature(self, logits: Tensor, target: Tensor) -> float:
        def loss(log_temperature: float) -> float:
            return float(self.loss(logits.double() / math.exp(log_temperature), target))

        return math.exp(float(optimize.minimize_scalar(loss, bounds=(-3.0, 3.0), method="bounded").x))

    def decide(self, outputs: Floats) -> NDArray[np.int64]:
        """Return class numbers: the most probable; of two, by the threshold on the probability of the second."""
        if len(self.classes) > 2:
            return np.asarray(outputs.argmax(1), np.int64)
        return np.asarray(outputs[:, 1] >= (EVEN if self.threshold is None else self.threshold), np.int64)

    def table(self, outputs: Floats) -> Columns:
        """Return ``prob_<class>`` columns, ``predicted``, and for two classes the ``threshold`` that was used."""
        columns: Columns = {f"prob_{name}": outputs[:, k] for k, name in enumerate(self.classes)}
        columns["predicted"] = np.asarray(self.classes)[self.decide(outputs)]
        if len(self.classes) > 2:
            return columns
        used = EVEN if self.threshold is None else self.threshold
        return columns | {"threshold": np.full(len(outputs), used)}

    def metrics(self, outputs: Floats, target: NDArray[Any]) -> Metrics:
        """Return the metrics of `eosin.mil.metrics.classification_metrics`."""
        return classification_metrics(outputs, target, self.decide(outputs), self.classes)

    def strata(self, rows: Sequence[Row]) -> list[str]:
        """Return the labels."""
        return [row[self.target] for row in rows]


class Classification(_ClassTask):
    """One of several classes: softmax cross-entropy, one logit per class.

    Attributes
    ----------
    classes : tuple of str
        Values of the label column, in the order of the logits.
    target : str
        The label column.
    threshold : float or None
        Probability of the second of two classes from which it is predicted; None: the most probable.
    temperature : float
        Divides the logits.
    """

    kind: Literal["classification"] = "classification"

    @property
    def n_outputs(self) -> int:
        """One logit per class."""
        return len(self.classes)

    def bag_losses(self, logits: Tensor, target: Tensor) -> Tensor:
        """Return the cross-entropy of each bag."""
        return functional.cross_entropy(wide(logits), target, reduction="none")

    def memberships(self, target: Tensor) -> Tensor:
        """Return the one-hot target, (B, K)."""
        return functional.one_hot(target, self.n_outputs).float()

    def activate(self, logits: Tensor) -> Floats:
        """Return the probability of each class."""
        return to_numpy((wide(logits) / self.temperature).softmax(1))


class Binary(_ClassTask):
    """Two classes with one logit, that of the second class: sigmoid cross-entropy.

    Attributes
    ----------
    classes : (negative, positive)
    target : str
        The label column.
    """

    kind: Literal["binary"] = "binary"
    classes: tuple[str, ...] = Field(min_length=2, max_length=2)

    @classmethod
    def _of(cls, classes: tuple[str, ...], target: str) -> Self:
        if len(classes) > 2:
            raise LabelError(f"column {target!r} has {len(classes)} classes; use --task classification")
        return super()._of(classes, target)

    @property
    def n_outputs(self) -> int:
        """One logit."""
        return 1

    def bag_losses(self, logits: Tensor, target: Tensor) -> Tensor:
        """Return the sigmoid cross-entropy of each bag."""
        logit = wide(logits)[:, 0]
        return functional.binary_cross_entropy_with_logits(logit, target.to(logit.dtype), reduction="none")

    def memberships(self, target: Tensor) -> Tensor:
        """Return 1 for positive bags, (B, 1)."""
        return target[:, None].float()

    def activate(self, logits: Tensor) -> Floats:
        """Return the probability of each class, (B, 2)."""
        positive = (wide(logits) / self.temperature).sigmoid()
        return to_numpy(torch.cat([1 - positive, positive], 1))


class Ordinal(_ClassTask):
    """Ordered classes, such as grades: one logit per step from a class to the next.

    Logit k says whether the class is above k, given that it is at least k (CORN; Shi, Cao, Raschka, 2021,
    https://arxiv.org/abs/2111.08851): the products of these probabilities fall with k by construction. The loss of a
    bag is the sum of the sigmoid cross-entropies of the steps up to its class, divided by the number of steps.

    Attributes
    ----------
    classes : tuple of str
        From lowest to highest.
    target : str
        The label column.
    """

    selection_metric: ClassVar[str] = "quadratic_kappa"
    kind: Literal["ordinal"] = "ordinal"

    def tuned(self, logits: Tensor, target: Tensor, *, threshold: bool = False, temperature: bool = False) -> Self:
        """Return the task with a temperature; ordered classes are decided by their median and have no threshold."""
        if threshold:
            raise ConfigError("ordered classes have no threshold; set training.threshold to false")
        return super().tuned(logits, target, temperature=temperature)

    @property
    def n_outputs(self) -> int:
        """One logit per step."""
        return len(self.classes) - 1

    def bag_losses(self, logits: Tensor, target: Tensor) -> Tensor:
        """Return the loss of each bag."""
        steps = torch.arange(self.n_outputs, device=target.device)
        above = (target[:, None] > steps).to(wide(logits).dtype)  # (B, K)
        reached = target[:, None] >= steps
        losses = functional.binary_cross_entropy_with_logits(wide(logits), above, reduction="none")
        return (losses * reached).sum(1) / self.n_outputs

    def memberships(self, target: Tensor) -> Tensor:
        """Return 1 for each step that the class is above, (B, K)."""
        return (target[:, None] > torch.arange(self.n_outputs, device=target.device)).float()

    def activate(self, logits: Tensor) -> Floats:
        """Return the probability of each class, (B, classes)."""
        above = (wide(logits) / self.temperature).sigmoid().cumprod(1)
        ones = above.new_ones(len(above), 1)
        return to_numpy(torch.cat([ones, above], 1) - torch.cat([above, 0 * ones], 1))

    def decide(self, outputs: Floats) -> NDArray[np.int64]:
        """Return the number of the median class."""
        return np.asarray((outputs.cumsum(1) < 0.5).sum(1).clip(max=outputs.shape[1] - 1), np.int64)

    def metrics(self, outputs: Floats, target: NDArray[Any]) -> Metrics:
        """Return quadratic_kappa, mean_absolute_error in classes, and the metrics of a classification."""
        predicted = self.decide(outputs)
        matrix = confusion(target, predicted, len(self.classes))
        ordered: Metrics = {
            "quadratic_kappa": kappa(matrix, quadratic=True),
            "mean_absolute_error": float(np.abs(target - predicted).mean()),
        }
        return ordered | classification_metrics(outputs, target, predicted, self.classes)


class MultiLabel(Task):
    """Several yes-or-no labels at once: sigmoid cross-entropy, one logit each.

    Attributes
    ----------
    targets : tuple of str
        The label columns.
    positives : tuple of str
        The value of each column that is positive: the last of its two.
    negatives : tuple of str
        The other values.
    """

    selection_metric: ClassVar[str] = "auc"
    kind: Literal["multilabel"] = "multilabel"
    targets: tuple[str, ...] = Field(min_length=1)
    positives: tuple[str, ...]
    negatives: tuple[str, ...]

    @classmethod
    def from_rows(cls, rows: Sequence[Row], target: str) -> Self:
        """Make the task of columns with two values each."""
        columns = tuple(name.strip() for name in target.split(","))
        values = [sorted_labels({row[name] for row in rows}) for name in columns]
        for name, found in zip(columns, values, strict=True):
            if len(found) != 2:
                raise LabelError(f"column {name!r} has {len(found)} values; a label of several must have two")
        return cls(targets=columns, negatives=tuple(v[0] for v in values), positives=tuple(v[1] for v in values))

    @property
    def columns(self) -> tuple[str, ...]:
        """The label columns."""
        return self.targets

    @property
    def n_outputs(self) -> int:
        """One logit per label."""
        return len(self.targets)

    def encode(self, rows: Sequence[Row]) -> Tensor:
        """Return 0 or 1 per label, (B, K) int64."""
        return torch.tensor([[self._flag(row, k) for k in range(self.n_outputs)] for row in rows], dtype=torch.int64)

    def _flag(self, row: Row, label: int) -> int:
        value, known = row[self.targets[label]], (self.negatives[label], self.positives[label])
        if value not in known:
            raise LabelError(f"{value!r} in column {self.targets[label]!r} is neither {known[0]} nor {known[1]}")
        return known.index(value)

    def decode(self, target: NDArray[Any]) -> list[NDArray[Any]]:
        """Return the values of each column."""
        return [self._names(target[:, k], k) for k in range(self.n_outputs)]

    def _names(self, flags: NDArray[Any], label: int) -> NDArray[Any]:
        return np.asarray((self.negatives[label], self.positives[label]))[flags.astype(np.int64)]

    def require_trainable(self, target: Tensor) -> None:
        """Refuse a label that has one value only."""
        for name, column in zip(self.targets, target.T, strict=True):
            if column.min() == column.max():
                raise LabelError(f"all training slides have the same {name!r}; use fewer folds, or leave the label out")

    def bag_losses(self, logits: Tensor, target: Tensor) -> Tensor:
        """Return the mean over the labels of the sigmoid cross-entropy."""
        logit = wide(logits)
        return functional.binary_cross_entropy_with_logits(logit, target.to(logit.dtype), reduction="none").mean(1)

    def memberships(self, target: Tensor) -> Tensor:
        """Return the labels as float."""
        return target.float()

    def activate(self, logits: Tensor) -> Floats:
        """Return the probability of each label."""
        return to_numpy(wide(logits).sigmoid())

    def table(self, outputs: Floats) -> Columns:
        """Return ``prob_<label>`` and ``predicted_<label>`` columns."""
        columns: Columns = {f"prob_{name}": outputs[:, k] for k, name in enumerate(self.targets)}
        return columns | {
            f"predicted_{name}": self._names(outputs[:, k] >= 0.5, k) for k, name in enumerate(self.targets)
        }

    def metrics(self, outputs: Floats, target: NDArray[Any]) -> Metrics:
        """Return auc and average_precision, each also per label, and accuracy, each the mean over labels."""
        areas = [roc_auc(outputs[:, k], target[:, k] == 1) for k in range(self.n_outputs)]
        precisions = [average_precision(outputs[:, k], target[:, k] == 1) for k in range(self.n_outputs)]
        found: Metrics = {
            "auc": mean_if_defined(areas),
            "average_precision": mean_if_defined(precisions),
            "accuracy": float(((outputs >= 0.5) == target).mean()),
        }
        return found | {f"auc_{name}": area for name, area in zip(self.targets, areas, strict=True)}

    def strata(self, rows: Sequence[Row]) -> list[str]:
        """Return the rarest positive label of each row, so that every label is shared out."""
        flags = self.encode(rows).numpy()
        order = np.argsort(flags.sum(0), kind="stable")
        return [next((self.targets[k] for k in order if row[k]), "none") for row in flags]


class Regression(Task):
    """A number: squared error in units of the training part's standard deviation.

    Attributes
    ----------
    target : str
        The label column.
    mean, deviation : float
        Of the training part; see `fit_to`.
    """

    selection_metric: ClassVar[str] = "r2"
    kind: Literal["regression"] = "regression"
    learnt: ClassVar[frozenset[str]] = frozenset({"mean", "deviation"})
    target: str = "label"
    mean: float = 0.0
    deviation: float = Field(default=1.0, gt=0)

    @classmethod
    def from_rows(cls, rows: Sequence[Row], target: str) -> Self:
        """Make the task of a column of numbers."""
        if len({number(row[target], target) for row in rows}) < 2:
            raise LabelError(f"every value in column {target!r} is the same; there is nothing to learn")
        return cls(target=target)

    def fit_to(self, target: Tensor) -> Self:
        """Return the task with mean and deviation of these targets."""
        deviation = float(target.std(correction=0))
        return self.model_copy(update={"mean": float(target.mean()), "deviation": deviation or 1.0})

    @property
    def columns(self) -> tuple[str, ...]:
        """The label column."""
        return (self.target,)

    @property
    def n_outputs(self) -> int:
        """One number."""
        return 1

    def encode(self, rows: Sequence[Row]) -> Tensor:
        """Return the numbers, (B,) float64."""
        return torch.tensor([number(row[self.target], self.target) for row in rows], dtype=torch.float64)

    def decode(self, target: NDArray[Any]) -> list[NDArray[Any]]:
        """Return the numbers."""
        return [target]

    def bag_losses(self, logits: Tensor, target: Tensor) -> Tensor:
        """Return half the squared error of each bag, in squared deviations."""
        output = wide(logits)[:, 0]
        return (output - ((target - self.mean) / self.deviation).to(output.dtype)).square() / 2

    def activate(self, logits: Tensor) -> Floats:
        """Return the numbers, (B, 1)."""
        return to_numpy(wide(logits)) * self.deviation + self.mean

    def table(self, outputs: Floats) -> Columns:
        """Return the column ``predicted``."""
        return {"predicted": outputs[:, 0]}

    def metrics(self, outputs: Floats, target: NDArray[Any]) -> Metrics:
        """Return mean_absolute_error, rmse, r2, pearson and spearman."""
        error = outputs[:, 0] - target
        spread = float(((target - target.mean()) ** 2).sum())
        varies = len(target) > 1 and spread > 0 and float(np.ptp(outputs)) > 0
        return {
            "mean_absolute_error": float(np.abs(error).mean()),
            "rmse": float(np.sqrt((error**2).mean())),
            "r2": 1 - float((error**2).sum()) / spread if spread else None,
            "pearson": float(np.corrcoef(outputs[:, 0], target)[0, 1]) if varies else None,
            "spearman": float(stats.spearmanr(outputs[:, 0], target).statistic) if varies else None,
        }

    def strata(self, rows: Sequence[Row]) -> list[str]:
        """Return quarters by rank."""
        return rank_bins(self.encode(rows).numpy(), 4)


TASKS: dict[str, type[Task]] = {
    "classification": Classification,
    "binary": Binary,
    "ordinal": Ordinal,
    "multilabel": MultiLabel,
    "regression": Regression,
    "survival": DiscreteSurvival,
    "cox": Cox,
}


def load_task(data: Mapping[str, Any]) -> Task:
    """Build the task that `Task.model_dump` described.

    Raises
    ------
    ConfigError
        If the description fits no task.
    """
    kind = data.get("kind")
    if kind not in TASKS:
        raise ConfigError(f"the description of the task is damaged: no task is called {kind!r}")
    return TASKS[kind].parse(data, source="the description of the task")


def make_task(kind: str, rows: Sequence[Row], *, target: str = "label") -> Task:
    """Make the task that a label table poses.

    Parameters
    ----------
    kind : str
        ``classification``, ``binary``, ``ordinal``, ``multilabel``, ``regression``, ``survival`` or ``cox``.
    rows : sequence of mappings
        Rows of the label table, values as text.
    target : str
        The label column; ``a,b,c`` for the columns of ``multilabel``, ``time,event`` for survival.

    Raises
    ------
    UnknownNameError
        If there is no such task.
    LabelError
        If the labels do not pose such a task.
    """
    if kind not in TASKS:
        raise UnknownNameError("task", kind, TASKS)
    return TASKS[kind].from_rows(rows, target)


def sorted_labels(values: set[str]) -> tuple[str, ...]:
    """Return labels in order: by number when all are numbers, else as text."""
    try:
        return tuple(sorted(values, key=lambda value: (float(value), value)))
    except ValueError:
        return tuple(sorted(values))
