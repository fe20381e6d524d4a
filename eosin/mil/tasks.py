"""What a label means: its encoding, loss, predicted columns and metrics. Nothing else in the package knows.

A task is a frozen options object, so a model folder stores it as JSON and builds it again.
"""

from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from eosin.errors import ConfigError, LabelError
from eosin.options import Options

Row = Mapping[str, str]
Columns = dict[str, NDArray[np.generic]]


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
    """

    kind: str

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

    def bag_losses(self, logits: Tensor, target: Tensor) -> Tensor:
        """Return the loss of each bag, (B,) float32 or wider, from logits (B, K)."""
        raise NotImplementedError

    def loss(self, logits: Tensor, target: Tensor) -> Tensor:
        """Return the mean of `bag_losses`, a scalar."""
        return self.bag_losses(logits, target).mean()

    def memberships(self, target: Tensor) -> Tensor:
        """Return (B, K) float: 1 where the class of an output is true, for terms that label instances or branches.

        Raises
        ------
        ConfigError
            If the task has no classes.
        """
        raise ConfigError(f"task {self.kind} has no classes; the method asked for them works with classification only")

    def predict(self, logits: Tensor) -> Columns:
        """Return the columns of a prediction table, each with B values."""
        raise NotImplementedError


class Classification(Task):
    """One of several classes: softmax cross-entropy, one logit per class.

    Attributes
    ----------
    classes : tuple of str
        Values of the label column, in the order of the logits.
    target : str
        The label column.
    """

    kind: Literal["classification"] = "classification"
    classes: tuple[str, ...]
    target: str = "label"
    min_classes: ClassVar[int] = 2

    @property
    def columns(self) -> tuple[str, ...]:
        """The label column."""
        return (self.target,)

    @property
    def n_outputs(self) -> int:
        """One logit per class."""
        return len(self.classes)

    def encode(self, rows: Sequence[Row]) -> Tensor:
        """Return class numbers, (B,) int64."""
        return torch.tensor([_index(self.classes, row[self.target], self.target) for row in rows], dtype=torch.int64)

    def bag_losses(self, logits: Tensor, target: Tensor) -> Tensor:
        """Return the cross-entropy of each bag."""
        return functional.cross_entropy(_wide(logits), target, reduction="none")

    def memberships(self, target: Tensor) -> Tensor:
        """Return the one-hot target, (B, K)."""
        return functional.one_hot(target, self.n_outputs).float()

    def probabilities(self, logits: Tensor) -> Tensor:
        """Return the probability of each class, (B, classes)."""
        return _wide(logits).softmax(1)

    def predict(self, logits: Tensor) -> Columns:
        """Return ``prob_<class>`` columns and ``predicted``, the most probable class."""
        return _class_columns(self.probabilities(logits), self.classes)


class Binary(Task):
    """Two classes with one logit, that of the second class: sigmoid cross-entropy.

    Attributes
    ----------
    classes : (negative, positive)
    target : str
        The label column.
    """

    kind: Literal["binary"] = "binary"
    classes: tuple[str, str]
    target: str = "label"

    @property
    def columns(self) -> tuple[str, ...]:
        """The label column."""
        return (self.target,)

    @property
    def n_outputs(self) -> int:
        """One logit."""
        return 1

    def encode(self, rows: Sequence[Row]) -> Tensor:
        """Return class numbers, (B,) int64."""
        return torch.tensor([_index(self.classes, row[self.target], self.target) for row in rows], dtype=torch.int64)

    def bag_losses(self, logits: Tensor, target: Tensor) -> Tensor:
        """Return the sigmoid cross-entropy of each bag."""
        wide = _wide(logits)[:, 0]
        return functional.binary_cross_entropy_with_logits(wide, target.to(wide.dtype), reduction="none")

    def memberships(self, target: Tensor) -> Tensor:
        """Return 1 for positive bags, (B, 1)."""
        return target[:, None].float()

    def probabilities(self, logits: Tensor) -> Tensor:
        """Return the probability of each class, (B, 2)."""
        positive = _wide(logits).sigmoid()
        return torch.cat([1 - positive, positive], 1)

    def predict(self, logits: Tensor) -> Columns:
        """Return ``prob_<class>`` columns and ``predicted``, the most probable class."""
        return _class_columns(self.probabilities(logits), self.classes)


def _wide(logits: Tensor) -> Tensor:
    """Losses and probabilities are computed in float32 at least, whatever the autocast of the model."""
    return logits if logits.dtype == torch.float64 else logits.float()


def _index(classes: Sequence[str], value: str, column: str) -> int:
    if value not in classes:
        raise LabelError(f"{value!r} in column {column!r} is none of the classes {', '.join(classes)}")
    return list(classes).index(value)


def _class_columns(probabilities: Tensor, classes: Sequence[str]) -> Columns:
    values = probabilities.detach().double().cpu().numpy()  # (B, classes)
    columns: Columns = {f"prob_{name}": values[:, number] for number, name in enumerate(classes)}
    return columns | {"predicted": np.asarray(classes)[values.argmax(1)]}
