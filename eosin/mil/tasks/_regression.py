"""A number per slide."""

from collections.abc import Sequence
from typing import Any, ClassVar, Literal, Self

import numpy as np
import scipy
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from eosin.errors import LabelError
from eosin.mil._metrics import Floats, Metrics
from eosin.mil.task import TASKS, Columns, Row, Task, numbers, rank_bins, to_numpy, wide


@TASKS.register("regression")
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
        if len(set(numbers(rows, target))) < 2:
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

    def describe(self, rows: Sequence[Row]) -> str:
        """Return the range of the numbers."""
        values = self.encode(rows)
        return f"label: column {self.target!r}, numbers from {values.min():g} to {values.max():g}"

    def encode(self, rows: Sequence[Row]) -> Tensor:
        """Return the numbers, (B,) float64."""
        return torch.tensor(numbers(rows, self.target), dtype=torch.float64)

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

    def without_scale(self) -> Self:
        """Return the task with a mean of 0 and a deviation of 1."""
        return self.model_copy(update={"mean": 0.0, "deviation": 1.0})

    def mean_logits(self, tasks: Sequence[Self], logits: Sequence[Tensor]) -> Tensor:
        """Return the mean of the numbers."""
        numbers = [wide(own) * task.deviation + task.mean for task, own in zip(tasks, logits, strict=True)]
        return torch.stack(numbers).mean(0)

    def table(self, outputs: Floats) -> Columns:
        """Return the column ``predicted``."""
        return {"predicted": outputs[:, 0]}

    def surprise(self, outputs: Floats, target: NDArray[Any], *, folds: NDArray[np.int64] | None = None) -> Floats:
        """Return the absolute error."""
        return np.asarray(np.abs(outputs[:, 0] - target))

    def metrics(
        self,
        outputs: Floats,
        target: NDArray[Any],
        decided: NDArray[np.int64] | None = None,
        *,
        folds: NDArray[np.int64] | None = None,
    ) -> Metrics:
        """Return mean_absolute_error, rmse, r2, pearson and spearman."""
        error = outputs[:, 0] - target
        spread = float(((target - target.mean()) ** 2).sum())
        varies = len(target) > 1 and spread > 0 and float(np.ptp(outputs)) > 0
        return {
            "mean_absolute_error": float(np.abs(error).mean()),
            "rmse": float(np.sqrt((error**2).mean())),
            "r2": 1 - float((error**2).sum()) / spread if spread else None,
            "pearson": float(np.corrcoef(outputs[:, 0], target)[0, 1]) if varies else None,
            "spearman": float(scipy.stats.spearmanr(outputs[:, 0], target).statistic) if varies else None,
        }

    def strata(self, rows: Sequence[Row]) -> list[str]:
        """Return quarters by rank."""
        return rank_bins(self.encode(rows).numpy(), 4)

    def soft_strata(self, rows: Sequence[Row]) -> frozenset[str]:
        """Return all of them."""
        return frozenset(self.strata(rows))
