"""What a label means: its encoding, loss, predicted columns and metrics. Nothing else in the package knows.

A task is a frozen options object, so a model folder stores it as JSON and builds it again.
"""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, TypeAdapter, ValidationError
from torch import Tensor
from torch.nn import functional

from eosin.errors import ConfigError, LabelError, UnknownNameError
from eosin.mil.metrics import Floats, Metrics, classification_metrics
from eosin.options import Options

Row = Mapping[str, str]
Columns = dict[str, NDArray[Any]]


class Task(Options):
    """Base of all tasks.

    Attributes
    ----------
    kind : str
        Name of the task on the command line and in files.
    columns : tuple of str
        Columns of the label table that the target is made of.
    n_outputs : int
        Logits K that an aggregator must give.
    selection_metric : str
        The metric, higher is better, by which ``training.select: metric`` chooses a model.
    """

    kind: str
    selection_metric: ClassVar[str]

    @property
    def columns(self) -> tuple[str, ...]:
        """Columns of the label table that the target is made of."""
        raise NotImplementedError

    @property
    def n_outputs(self) -> int:
        """Logits K per bag."""
        raise NotImplementedError

    def encode(self, rows: Sequence[Row]) -> Tensor:
        """Return the targets of rows of a label table, first dimension B; `LabelError` for a value of no meaning."""
        raise NotImplementedError

    def decode(self, target: NDArray[Any]) -> list[NDArray[Any]]:
        """Return the values of each of `columns` again, from encoded targets."""
        raise NotImplementedError

    def bag_losses(self, logits: Tensor, target: Tensor) -> Tensor:
        """Return the loss of each bag, (B,) float32 or wider, from logits (B, K)."""
        raise NotImplementedError

    def loss(self, logits: Tensor, target: Tensor) -> Tensor:
        """Return the mean of `bag_losses`, a scalar."""
        return self.bag_losses(logits, target).mean()

    def require_trainable(self, target: Tensor) -> None:
        """Raise `LabelError` when the targets of a training part leave something that could not be learnt."""

    def memberships(self, target: Tensor) -> Tensor:
        """Return (B, K) float: 1 where the class of an output is true, for terms that label instances or branches.

        Raises
        ------
        ConfigError
            If the task has no classes.
        """
        raise ConfigError(f"task {self.kind} has no classes; the method asked for them works with classification only")

    def balance(self, target: Tensor) -> Tensor:
        """Return a weight per example, (B,) with mean 1, that gives each class the same sum.

        Raises
        ------
        ConfigError
            If the task has no classes.
        """
        raise ConfigError(f"task {self.kind} has no classes to balance; set training.balance to none")

    def activate(self, logits: Tensor) -> Floats:
        """Return what the logits say, (B, outputs) float64; the mean of it over several models is an ensemble."""
        raise NotImplementedError

    def table(self, outputs: Floats) -> Columns:
        """Return the columns of a prediction table, each with B values, from activated outputs."""
        raise NotImplementedError

    def metrics(self, outputs: Floats, target: NDArray[Any]) -> Metrics:
        """Return every metric of activated outputs by name; None where the data do not define it."""
        raise NotImplementedError

    def strata(self, rows: Sequence[Row]) -> list[str]:
        """Return the stratum of each row, to balance splits; the values of a class label, bins of a number."""
        raise NotImplementedError


class _ClassTask(Task):
    """What single-label classification shares, whatever the number of logits."""

    selection_metric: ClassVar[str] = "auc"
    classes: tuple[str, ...] = Field(min_length=2)
    target: str = "label"

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

    def table(self, outputs: Floats) -> Columns:
        """Return ``prob_<class>`` columns and ``predicted``, the most probable class."""
        columns: Columns = {f"prob_{name}": outputs[:, number] for number, name in enumerate(self.classes)}
        return columns | {"predicted": np.asarray(self.classes)[outputs.argmax(1)]}

    def metrics(self, outputs: Floats, target: NDArray[Any]) -> Metrics:
        """Return the metrics of `eosin.mil.metrics.classification_metrics`."""
        return classification_metrics(outputs, target, outputs.argmax(1), self.classes)

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
        return to_numpy(wide(logits).softmax(1))


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
        positive = wide(logits).sigmoid()
        return to_numpy(torch.cat([1 - positive, positive], 1))


def wide(logits: Tensor) -> Tensor:
    """Return logits in float32 at least: losses and probabilities do not follow the autocast of the model."""
    return logits if logits.dtype == torch.float64 else logits.float()


def to_numpy(values: Tensor) -> Floats:
    """Return a tensor as float64 on the host."""
    array: Floats = values.detach().double().cpu().numpy()
    return array


AnyTask = Annotated[Classification | Binary, Field(discriminator="kind")]
TASKS: dict[str, type[Task]] = {"classification": Classification, "binary": Binary}


def load_task(data: Mapping[str, Any]) -> Task:
    """Build the task that `Task.model_dump` described.

    Raises
    ------
    ConfigError
        If the description fits no task.
    """
    try:
        task: Task = TypeAdapter(AnyTask).validate_python(dict(data))
    except ValidationError as error:
        raise ConfigError(f"the description of the task is damaged: {error.errors()[0]['msg']}") from None
    return task


def make_task(kind: str, rows: Sequence[Row], *, target: str = "label") -> Task:
    """Make a task whose classes are those of a label table.

    Parameters
    ----------
    kind : str
        ``classification`` or ``binary``.
    rows : sequence of mappings
        Rows of the label table, values as text.
    target : str
        The label column.

    Raises
    ------
    UnknownNameError
        If there is no such task.
    LabelError
        If the labels have fewer than two values, or more than the task can tell apart.
    """
    if kind not in TASKS:
        raise UnknownNameError("task", kind, TASKS)
    classes = sorted_labels({row[target] for row in rows})
    if len(classes) < 2:
        raise LabelError(
            f"column {target!r} has only the label {', '.join(classes)!r}; at least two classes are needed to train"
        )
    if kind == "binary" and len(classes) > 2:
        raise LabelError(f"column {target!r} has {len(classes)} classes; use --task classification")
    return TASKS[kind](kind=kind, classes=classes, target=target)  # type: ignore[call-arg]


def sorted_labels(values: set[str]) -> tuple[str, ...]:
    """Return labels in order: by number when all are numbers, else as text."""
    try:
        return tuple(sorted(values, key=lambda value: (float(value), value)))
    except ValueError:
        return tuple(sorted(values))
