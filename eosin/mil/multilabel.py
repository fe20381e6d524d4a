"""Several yes-or-no labels at once."""

from collections.abc import Sequence
from typing import Any, ClassVar, Literal, Self

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from eosin.errors import LabelError
from eosin.mil.classification import sorted_labels
from eosin.mil.metrics import Floats, Metrics, average_precision, mean_if_defined, roc_auc
from eosin.mil.task import Columns, Row, Task, to_numpy, wide


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
        columns = cls.named_columns(target)
        values = [sorted_labels({row[name] for row in rows}) for name in columns]
        for name, found in zip(columns, values, strict=True):
            if len(found) != 2:
                raise LabelError(f"column {name!r} has {len(found)} values; a label of several must have two")
        return cls(targets=columns, negatives=tuple(v[0] for v in values), positives=tuple(v[1] for v in values))

    @classmethod
    def named_columns(cls, target: str) -> tuple[str, ...]:
        """Return the columns of ``a,b,c``."""
        return tuple(name.strip() for name in target.split(","))

    def describe(self, rows: Sequence[Row]) -> str:
        """Return how many rows are positive for each label."""
        positive = self.encode(rows).sum(0).tolist()
        parts = zip(self.targets, self.positives, positive, strict=True)
        return "labels: " + ", ".join(f"{name} = {value} in {count} of {len(rows)}" for name, value, count in parts)

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
        flags = [[self._flag(row, k) for k in range(self.n_outputs)] for row in rows]
        return torch.tensor(flags, dtype=torch.int64).reshape(-1, self.n_outputs)

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

    def decide(self, outputs: Floats) -> NDArray[np.int64]:
        """Return 1 for each label whose probability is at least one half, (B, K)."""
        return np.asarray(outputs >= 0.5, np.int64)

    def metrics(
        self,
        outputs: Floats,
        target: NDArray[Any],
        decided: NDArray[np.int64] | None = None,
        *,
        folds: NDArray[np.int64] | None = None,
    ) -> Metrics:
        """Return auc and average_precision, each also per label, and accuracy and f1, each the mean over labels."""
        flags = self.decide(outputs) if decided is None else decided
        areas = [roc_auc(outputs[:, k], target[:, k] == 1) for k in range(self.n_outputs)]
        precisions = [average_precision(outputs[:, k], target[:, k] == 1) for k in range(self.n_outputs)]
        found: Metrics = {
            "auc": mean_if_defined(areas),
            "average_precision": mean_if_defined(precisions),
            "accuracy": float((flags == target).mean()),
            "f1": mean_if_defined([_f1(flags[:, k], target[:, k]) for k in range(self.n_outputs)]),
        }
        found |= {f"auc_{name}": area for name, area in zip(self.targets, areas, strict=True)}
        return found | {f"average_precision_{name}": area for name, area in zip(self.targets, precisions, strict=True)}

    def surprise(self, outputs: Floats, target: NDArray[Any], *, folds: NDArray[np.int64] | None = None) -> Floats:
        """Return the mean over the labels of one minus the probability of the truth."""
        return np.asarray(np.abs(outputs - target).mean(1))

    def strata(self, rows: Sequence[Row]) -> list[str]:
        """Return the rarest positive label of each row, so that every label is shared out."""
        flags = self.encode(rows).numpy()
        order = np.argsort(flags.sum(0), kind="stable")
        return [next((self.targets[k] for k in order if row[k]), "none") for row in flags]


def _f1(predicted: NDArray[np.int64], truth: NDArray[Any]) -> float | None:
    """Return the F1 of the positives; None when there are none."""
    both = int(((predicted == 1) & (truth == 1)).sum())
    return 2 * both / int(predicted.sum() + truth.sum()) if truth.any() else None
