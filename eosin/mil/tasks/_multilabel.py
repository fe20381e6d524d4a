"""Several yes-or-no labels at once."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, Self

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor
from torch.nn import functional
from typing_extensions import override

from eosin.errors import LabelError
from eosin.mil._intervals import Support
from eosin.mil._metrics import (
    EVEN,
    Floats,
    Metrics,
    average_precision,
    balanced_accuracy,
    best_threshold,
    confusion,
    expected_calibration_error,
    kappa,
    mean_if_defined,
    roc_auc,
)
from eosin.mil.task import TASKS, Columns, Row, Task, to_numpy, wide
from eosin.mil.tasks._classification import logit_of_mean, sorted_labels
from eosin.mil.tasks._polarity import positive_last, split_target

NONE = "none"


@TASKS.register("multilabel")
class MultiLabel(Task):
    """Several yes-or-no labels at once: sigmoid cross-entropy, one logit each.

    Attributes
    ----------
    targets : tuple of str
        The label columns.
    positives : tuple of str
        The value of each column that is positive: the one that is named, else see
        `eosin.mil.tasks._polarity.positive_last`.
    negatives : tuple of str
        The other values.
    thresholds : tuple of float
        Probability of each label from which it is positive; one half when empty.
    """

    selection_metric: ClassVar[str] = "auc"
    learnt: ClassVar[frozenset[str]] = frozenset({"thresholds"})
    kind: Literal["multilabel"] = "multilabel"
    targets: tuple[str, ...] = Field(min_length=1)
    positives: tuple[str, ...]
    negatives: tuple[str, ...]
    thresholds: tuple[float, ...] = ()

    @classmethod
    def from_rows(cls, rows: Sequence[Row], target: str) -> Self:
        """Make the task of columns with two values each; ``er=pos,pr`` names a positive value."""
        named = [split_target(part) for part in target.split(",")]
        columns = cls.named_columns(target)
        if len(set(columns)) < len(columns):
            raise LabelError(f"{target!r} names a column twice; list each label once")
        values = [sorted_labels({row[name] for row in rows}) for name in columns]
        for name, found in zip(columns, values, strict=True):
            if len(found) != 2:
                raise LabelError(f"column {name!r} has {len(found)} values; a multilabel column must have two")
        pairs = [positive_last(v, positive=said, column=name) for v, (name, said) in zip(values, named, strict=True)]
        return cls(targets=columns, negatives=tuple(p[0] for p in pairs), positives=tuple(p[1] for p in pairs))

    @classmethod
    def named_columns(cls, target: str) -> tuple[str, ...]:
        """Return the columns of ``a,b,c`` or of ``a=pos,b,c``."""
        return tuple(split_target(part)[0] for part in target.split(","))

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

    @property
    def tunable(self) -> frozenset[str]:
        """A threshold of each label."""
        return frozenset({"threshold"})

    def tuned(self, logits: Tensor, target: Tensor, *, threshold: bool = False, temperature: bool = False) -> Self:
        """Return the task with the threshold of the highest balanced accuracy for each label that has both values."""
        self.require_tunable(threshold=threshold, temperature=temperature)
        if not threshold:
            return self
        outputs, truth = self.activate(logits), target.numpy() == 1
        found = [
            best_threshold(outputs[:, k], truth[:, k]) if truth[:, k].any() and not truth[:, k].all() else EVEN
            for k in range(self.n_outputs)
        ]
        return self.model_copy(update={"thresholds": tuple(found)})

    def with_mean_threshold(self, tasks: Sequence[Task]) -> Self:
        """Return the task with the mean threshold of each label."""
        known = [task._used() for task in tasks if isinstance(task, MultiLabel)]
        return self.model_copy(update={"thresholds": tuple(np.mean(known, axis=0).tolist())})

    def _used(self) -> Floats:
        return np.asarray(self.thresholds or (EVEN,) * self.n_outputs)

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

    def mean_logits(self, tasks: Sequence[Self], logits: Sequence[Tensor]) -> Tensor:
        """Return the logits of the mean of the probabilities of each label."""
        return logit_of_mean(logits)

    @property
    @override
    def verdicts(self) -> tuple[str, ...]:
        return tuple(f"predicted_{name}" for name in self.targets)

    def table(self, outputs: Floats) -> Columns:
        """Return ``prob_<label>``, ``predicted_<label>`` and ``threshold_<label>`` columns."""
        flags, used = self.decide(outputs), self._used()
        columns: Columns = {f"prob_{name}": outputs[:, k] for k, name in enumerate(self.targets)}
        columns |= {f"predicted_{name}": self._names(flags[:, k], k) for k, name in enumerate(self.targets)}
        return columns | {f"threshold_{name}": np.full(len(outputs), used[k]) for k, name in enumerate(self.targets)}

    def decide(self, outputs: Floats) -> NDArray[np.int64]:
        """Return 1 for each label whose probability is at least its threshold, (B, K)."""
        return np.asarray(outputs >= self._used(), np.int64)

    def read_decided(self, columns: Mapping[str, Sequence[str]]) -> NDArray[np.int64]:
        """Return 1 for each label that was predicted, (B, K)."""
        predicted = [columns[f"predicted_{name}"] for name in self.targets]
        return np.stack(
            [[self._flag({self.targets[k]: value}, k) for value in column] for k, column in enumerate(predicted)],
            1,
        )

    def metrics(
        self,
        outputs: Floats,
        target: NDArray[Any],
        decided: NDArray[np.int64] | None = None,
        *,
        folds: NDArray[np.int64] | None = None,
    ) -> Metrics:
        """Return means over the labels; auc and average_precision also of each label. `f1` is that of the positives."""
        flags = self.decide(outputs) if decided is None else decided
        counts = [confusion(target[:, k].astype(np.int64), flags[:, k], 2) for k in range(self.n_outputs)]
        areas = [roc_auc(outputs[:, k], target[:, k] == 1) for k in range(self.n_outputs)]
        precisions = [average_precision(outputs[:, k], target[:, k] == 1) for k in range(self.n_outputs)]
        found: Metrics = {
            "auc": mean_if_defined(areas),
            "average_precision": mean_if_defined(precisions),
            "accuracy": float((flags == target).mean()),
            "balanced_accuracy": mean_if_defined([balanced_accuracy(matrix) for matrix in counts]),
            "kappa": mean_if_defined([kappa(matrix) for matrix in counts]),
            "brier": float(((outputs - target) ** 2).mean()),
            "ece": float(np.mean([expected_calibration_error(p, y) for p, y in zip(outputs.T, target.T, strict=True)])),
            "f1": mean_if_defined([_f1(flags[:, k], target[:, k]) for k in range(self.n_outputs)]),
        }
        found |= {f"auc_{name}": area for name, area in zip(self.targets, areas, strict=True)}
        return found | {f"average_precision_{name}": area for name, area in zip(self.targets, precisions, strict=True)}

    def supports(self, target: NDArray[Any]) -> dict[str, Support]:
        """Return the positive and the negative rows of a label; means over the labels rest on the rarest."""
        of_label = [(target[:, k] == 1, target[:, k] != 1) for k in range(self.n_outputs)]
        # a label that all rows have, or none, has no area that a mean could rest on
        rarest = min(of_label, key=lambda pair: min(int(rows.sum()) for rows in pair) or len(target))
        both, positive = Support(rarest), Support(rarest[:1])
        found = {"auc": both, "balanced_accuracy": both, "kappa": Support(rarest, -1.0)}
        found |= {"accuracy": Support((np.ones(len(target), bool),)), "average_precision": positive, "f1": positive}
        for name, pair in zip(self.targets, of_label, strict=True):
            found |= {f"auc_{name}": Support(pair), f"average_precision_{name}": Support(pair[:1])}
        return found

    def surprise(self, outputs: Floats, target: NDArray[Any], *, folds: NDArray[np.int64] | None = None) -> Floats:
        """Return the mean over the labels of one minus the probability of the truth."""
        return np.asarray(np.abs(outputs - target).mean(1))

    def strata(self, rows: Sequence[Row]) -> list[str]:
        """Return the rarest positive label of each row, so that every label is shared out."""
        flags = self.encode(rows).numpy()
        order = np.argsort(flags.sum(0), kind="stable")
        return [next((self.targets[k] for k in order if row[k]), NONE) for row in flags]

    def soft_strata(self, rows: Sequence[Row]) -> frozenset[str]:
        """Return the stratum without a positive label."""
        return frozenset({NONE})


def _f1(predicted: NDArray[np.int64], truth: NDArray[Any]) -> float | None:
    """Return the F1 of the positives; None when there are none."""
    both = int(((predicted == 1) & (truth == 1)).sum())
    return 2 * both / int(predicted.sum() + truth.sum()) if truth.any() else None
