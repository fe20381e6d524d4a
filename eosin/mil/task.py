"""What every task must say: how a label is encoded, learnt, predicted and judged."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from eosin.errors import ConfigError, LabelError
from eosin.mil.metrics import Floats, Metrics
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
    learnt : frozenset of str
        Fields that come from training or validation parts.
    """

    kind: str
    selection_metric: ClassVar[str]
    learnt: ClassVar[frozenset[str]] = frozenset()

    def same_question(self, other: "Task") -> bool:
        """Return whether two tasks differ at most in what was learnt from training or validation parts."""
        return self.model_dump(exclude=set(self.learnt)) == other.model_dump(exclude=set(other.learnt))

    def tuned(self, logits: Tensor, target: Tensor, *, threshold: bool = False, temperature: bool = False) -> Self:
        """Return the task with what it takes from a model's logits on the validation part; see the task's own text.

        Raises
        ------
        ConfigError
            If the task has no threshold or temperature.
        """
        if threshold or temperature:
            raise ConfigError(
                f"task {self.kind} has no threshold or temperature; set training.threshold and temperature to false"
            )
        return self

    @property
    def columns(self) -> tuple[str, ...]:
        """Columns of the label table that the target is made of."""
        raise NotImplementedError

    @property
    def n_outputs(self) -> int:
        """Logits K per bag."""
        raise NotImplementedError

    @classmethod
    def from_rows(cls, rows: Sequence[Row], target: str) -> Self:
        """Make the task that a label table poses.

        Parameters
        ----------
        rows : sequence of mappings
            Rows of the label table, values as text.
        target : str
            The label column; several, separated by commas, for a task of several.

        Raises
        ------
        LabelError
            If the labels do not pose such a task.
        """
        raise NotImplementedError

    def fit_to(self, target: Tensor) -> Self:
        """Return the task with what it takes from the targets of the training part alone: bins, mean and scale."""
        return self

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


def wide(logits: Tensor) -> Tensor:
    """Return logits in float32 at least: losses and probabilities do not follow the autocast of the model."""
    return logits if logits.dtype == torch.float64 else logits.float()


def to_numpy(values: Tensor) -> Floats:
    """Return a tensor as float64 on the host."""
    array: Floats = values.detach().double().cpu().numpy()
    return array


def number(value: str, column: str) -> float:
    """Return the number in a cell; `LabelError` when it is none."""
    try:
        result = float(value)
    except ValueError:
        result = float("nan")
    if not np.isfinite(result):
        raise LabelError(f"{value!r} in column {column!r} is no number; correct the label table")
    return result


def rank_bins(values: NDArray[Any], n_bins: int) -> list[str]:
    """Return the quantile bin of each value by rank, as text: strata of a number."""
    order = np.argsort(np.argsort(values, kind="stable"), kind="stable")
    return [str(place * n_bins // len(values)) for place in order]
