"""Tasks with one class per slide: two or more classes, one logit of two, ordered classes."""

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, Self

import numpy as np
import scipy
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from eosin.errors import LabelError
from eosin.mil._intervals import Support
from eosin.mil._metrics import EVEN, Floats, Metrics, best_threshold, classification_metrics, confusion, kappa
from eosin.mil._target import same_class
from eosin.mil.task import TASKS, Columns, Row, Task, to_numpy, wide
from eosin.mil.tasks._polarity import positive_last, split_target


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
        """Make the task whose classes are the values of a column, in order of number or text.

        Of two classes the second is the positive one: the value that ``label=tumor`` names, else see
        `eosin.mil.tasks._polarity.positive_last`.
        """
        column, positive = split_target(target)
        classes = sorted_labels({row[column] for row in rows})
        if len(classes) < 2:
            raise LabelError(
                f"column {column!r} has only the label {', '.join(classes)!r}; at least two classes are needed to train"
            )
        _require_unlike(classes, column)
        return cls._of(positive_last(classes, positive=positive, column=column), column)

    @classmethod
    def named_columns(cls, target: str) -> tuple[str, ...]:
        """Return the column of ``label``, of ``label=tumor`` or of ``grade=low<medium<high``."""
        return split_target(target)[:1]

    @classmethod
    def _of(cls, classes: tuple[str, ...], target: str) -> Self:
        return cls(classes=classes, target=target)  # type: ignore[call-arg]

    @property
    def columns(self) -> tuple[str, ...]:
        """The label column."""
        return (self.target,)

    def describe(self, rows: Sequence[Row]) -> str:
        """Return the classes in their order, how many rows each has, and which of two is the positive one."""
        found = Counter(row[self.target] for row in rows)
        classes = ", ".join(f"{name} ({found[name]})" for name in self.classes)
        return f"label: column {self.target!r}, classes {classes}{self._positive_note()}"

    def _positive_note(self) -> str:
        if len(self.classes) > 2:
            return ""
        negative, positive = self.classes
        return f", positive: {positive} (--target '{self.target}={negative}' for the other)"

    def encode(self, rows: Sequence[Row]) -> Tensor:
        """Return class numbers, (B,) int64."""
        return torch.tensor([self._number(row[self.target]) for row in rows], dtype=torch.int64)

    def decode(self, target: NDArray[Any]) -> list[NDArray[Any]]:
        """Return the names of the classes."""
        return [np.asarray(self.classes)[target]]

    def _number(self, value: str) -> int:
        if value not in self.classes:
            raise LabelError(
                f"{value!r} in column {self.target!r} is not one of the classes {', '.join(self.classes)}; "
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
        # with a mean of 1 a learning rate means what it does without weights
        return (weights / weights.mean()).float()

    @property
    def tunable(self) -> frozenset[str]:
        """A temperature, and of two classes a threshold."""
        return frozenset({"temperature"} if len(self.classes) > 2 else {"temperature", "threshold"})

    def _untunable(self, name: str) -> str:
        return f"a {name} needs two classes, column {self.target!r} has {len(self.classes)}"

    def tuned(self, logits: Tensor, target: Tensor, *, threshold: bool = False, temperature: bool = False) -> Self:
        """Return the task with a temperature and, of two classes, a threshold from the validation part.

        The temperature divides the logits and minimises the loss (Guo et al., ICML 2017,
        https://arxiv.org/abs/1706.04599) under a prior, log T ~ N(0, 1), that the loss outweighs where there are many
        bags: a small part that a model separates would have it sharpen without end. The threshold on the probability of
        the second class has the highest balanced accuracy. Neither is changed by a validation part that lacks a class.
        """
        self.require_tunable(threshold=threshold, temperature=temperature)
        if len(set(target.tolist())) < len(self.classes):
            return self
        result = self
        if temperature:
            result = result.model_copy(update={"temperature": self._best_temperature(logits, target)})
        if threshold:
            positive = result.activate(logits)[:, 1]
            result = result.model_copy(update={"threshold": best_threshold(positive, target.numpy() == 1)})
        return result

    def with_mean_threshold(self, tasks: Sequence[Task]) -> Self:
        """Return the task with the mean threshold; a model without one, where others have one, decides at one half."""
        known = [task.threshold for task in tasks if isinstance(task, _ClassTask)]
        if all(threshold is None for threshold in known):
            return self
        used = [EVEN if threshold is None else threshold for threshold in known]
        return self.model_copy(update={"threshold": float(np.mean(used))})

    def without_scale(self) -> Self:
        """Return the task with a temperature of 1."""
        return self.model_copy(update={"temperature": 1.0})

    def mean_logits(self, tasks: Sequence[Self], logits: Sequence[Tensor]) -> Tensor:
        """Return the logits of the mean of the probabilities."""
        return self._mean([own / task.temperature for task, own in zip(tasks, logits, strict=True)])

    def _mean(self, logits: Sequence[Tensor]) -> Tensor:
        raise NotImplementedError

    def _best_temperature(self, logits: Tensor, target: Tensor) -> float:
        def unlikeliness(log_temperature: float) -> float:
            scaled = self.bag_losses(logits.double() / math.exp(log_temperature), target)
            return float(scaled.sum()) + log_temperature**2 / 2

        # T from 0.05 to 20
        return math.exp(float(scipy.optimize.minimize_scalar(unlikeliness, bounds=(-3.0, 3.0), method="bounded").x))

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

    def read_outputs(self, columns: Mapping[str, Sequence[str]]) -> Floats:
        """Return the probabilities of the classes."""
        return np.stack([np.asarray(columns[f"prob_{name}"], np.float64) for name in self.classes], 1)

    def read_decided(self, columns: Mapping[str, Sequence[str]]) -> NDArray[np.int64]:
        """Return the numbers of the predicted classes."""
        return np.asarray([self.classes.index(name) for name in columns["predicted"]], np.int64)

    def metrics(
        self,
        outputs: Floats,
        target: NDArray[Any],
        decided: NDArray[np.int64] | None = None,
        *,
        folds: NDArray[np.int64] | None = None,
    ) -> Metrics:
        """Return the metrics of `eosin.mil._metrics.classification_metrics`."""
        predicted = self.decide(outputs) if decided is None else decided
        return classification_metrics(outputs, target, predicted, self.classes)

    def supports(self, target: NDArray[Any]) -> dict[str, Support]:
        """Return all rows for accuracy, those of a class for its rates, and those of every class for the rest."""
        members = tuple(target == k for k in range(len(self.classes)))
        compared = Support(members)
        found = {"accuracy": Support((np.ones(len(target), bool),)), "kappa": Support(members, -1.0)}
        found |= dict.fromkeys(("balanced_accuracy", "f1", "auc", "average_precision"), compared)
        if len(members) == 2:
            rates = {"specificity": Support(members[:1]), "sensitivity": Support(members[1:])}
            return found | rates | {"average_precision": rates["sensitivity"]}
        return found | {f"auc_{name}": Support((own, ~own)) for name, own in zip(self.classes, members, strict=True)}

    def surprise(self, outputs: Floats, target: NDArray[Any], *, folds: NDArray[np.int64] | None = None) -> Floats:
        """Return one minus the probability of the true class."""
        return np.asarray(1 - outputs[np.arange(len(target)), target])

    def strata(self, rows: Sequence[Row]) -> list[str]:
        """Return the labels."""
        return [row[self.target] for row in rows]


@TASKS.register("classification")
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

    def _mean(self, logits: Sequence[Tensor]) -> Tensor:
        return torch.stack([own.log_softmax(1) for own in logits]).logsumexp(0) - math.log(len(logits))


@TASKS.register("binary")
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

    def _mean(self, logits: Sequence[Tensor]) -> Tensor:
        return logit_of_mean(logits)


@TASKS.register("ordinal")
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

    @classmethod
    def from_rows(cls, rows: Sequence[Row], target: str) -> Self:
        """Make the task of ``grade``, in order of the number in each value, or of ``grade=low<medium<high``."""
        column, said = split_target(target)
        order = tuple(name.strip() for name in said.split("<") if name.strip())
        plain = super().from_rows(rows, column)
        if not order:
            order = _by_number(plain.classes, column)
        unknown = set(plain.classes) ^ set(order)
        if unknown:
            raise LabelError(
                f"the order {'<'.join(order)} and the values {', '.join(plain.classes)} of column {column!r} differ; "
                f"list every value once"
            )
        return plain.model_copy(update={"classes": order})

    def describe(self, rows: Sequence[Row]) -> str:
        """Return the classes from lowest to highest, and how many rows each has."""
        return super().describe(rows).replace("classes", "grades from lowest to highest")

    def _positive_note(self) -> str:
        return ""

    @property
    def tunable(self) -> frozenset[str]:
        """A temperature; ordered classes are decided by their median and have no threshold."""
        return frozenset({"temperature"})

    def _untunable(self, name: str) -> str:
        return f"ordered classes have no {name}"

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

    def _mean(self, logits: Sequence[Tensor]) -> Tensor:
        """Return log P(above k) - log P(k), of the means over the models: the logit of the step from k."""
        above = [functional.logsigmoid(own).cumsum(1) for own in logits]
        # P(k) = P(above k - 1) (1 - σ), in logarithms, for differences of probabilities near 1 lose their digits
        here = [
            functional.pad(up, (1, 0))[:, :-1] + functional.logsigmoid(-own)
            for up, own in zip(above, logits, strict=True)
        ]
        return torch.stack(above).logsumexp(0) - torch.stack(here).logsumexp(0)

    def decide(self, outputs: Floats) -> NDArray[np.int64]:
        """Return the number of the median class."""
        return np.asarray((outputs.cumsum(1) < 0.5).sum(1).clip(max=outputs.shape[1] - 1), np.int64)

    def metrics(
        self,
        outputs: Floats,
        target: NDArray[Any],
        decided: NDArray[np.int64] | None = None,
        *,
        folds: NDArray[np.int64] | None = None,
    ) -> Metrics:
        """Return quadratic_kappa, mean_absolute_error in classes, and the metrics of a classification."""
        predicted = self.decide(outputs) if decided is None else decided
        matrix = confusion(target, predicted, len(self.classes))
        ordered: Metrics = {
            "quadratic_kappa": kappa(matrix, quadratic=True),
            "mean_absolute_error": float(np.abs(target - predicted).mean()),
        }
        return ordered | classification_metrics(outputs, target, predicted, self.classes)

    def supports(self, target: NDArray[Any]) -> dict[str, Support]:
        """Return also what the measures of order rest on."""
        found = super().supports(target)
        error = Support(found["accuracy"].groups, 0.0, len(self.classes) - 1.0)
        return found | {"quadratic_kappa": found["kappa"], "mean_absolute_error": error}


def logit_of_mean(logits: Sequence[Tensor]) -> Tensor:
    """Return the logits whose sigmoid is the mean of the sigmoids of several."""
    stacked = torch.stack(list(logits))
    return functional.logsigmoid(stacked).logsumexp(0) - functional.logsigmoid(-stacked).logsumexp(0)


def _require_unlike(classes: Sequence[str], column: str) -> None:
    """Refuse classes that differ only in what `same_class` forgets: one class, entered in several ways."""
    spellings: dict[str, list[str]] = {}
    for name in classes:
        spellings.setdefault(same_class(name), []).append(name)
    groups = [" and ".join(map(repr, group)) for group in spellings.values() if len(group) > 1]
    if groups:
        raise LabelError(
            f"column {column!r} has {'; '.join(groups)}, which look like one class; use one spelling, "
            "or pass --ids merge"
        )


def sorted_labels(values: set[str]) -> tuple[str, ...]:
    """Return labels in order: by number when all are numbers, else as text."""
    try:
        return tuple(sorted(values, key=lambda value: (float(value), value)))
    except ValueError:
        return tuple(sorted(values))


def _by_number(classes: Sequence[str], column: str) -> tuple[str, ...]:
    """Return values in order of the one number that each holds after the same prefix: 0, 1, 2 or G1, G2, G3."""
    found = [re.fullmatch(r"(\D*)(\d+(?:\.\d+)?)", name) for name in classes]
    matches = [match for match in found if match is not None]
    if len(matches) < len(classes) or len({match[1] for match in matches}) > 1:
        raise LabelError(
            f"the order of {', '.join(classes)} in column {column!r} is not known; "
            f"state it (--target '{column}={'<'.join(classes)}')"
        )
    return tuple(sorted(classes, key=lambda name: float(re.sub(r"^\D*", "", name))))
