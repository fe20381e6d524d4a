"""Several targets at once: one model, a slice of its logits for each target, and gaps in the table allowed."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar, Literal, Self

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, SerializeAsAny, field_validator
from torch import Tensor
from typing_extensions import override

from eosin.errors import LabelError
from eosin.mil._intervals import Support
from eosin.mil._metrics import Floats, Metrics, mean_if_defined
from eosin.mil._step_losses import StepLosses
from eosin.mil._target import has_value
from eosin.mil.task import TASKS, Columns, Row, Task, load_task, wide

MISSING = "missing"


@TASKS.register("multitask")
class MultiTask(Task):
    """A task of several tasks, each over its own slice of the logits.

    A target is (B, T) float64: the targets of the parts side by side, NaN where the table says nothing. The loss of a
    bag is the sum over its known targets of the part's loss, divided by the number of parts; a part without a known
    target in a pack has no gradient. Metrics and columns carry the name of the part; ``score`` is the mean of what each
    part is selected by, and these follow it. A threshold or temperature is chosen for each part that has one, on the
    validation bags whose target of it is known.

    Attributes
    ----------
    names : tuple of str
        First column of each part.
    parts : tuple of Task
    """

    kind: Literal["multitask"] = "multitask"
    selection_metric: ClassVar[str] = "score"
    learnt: ClassVar[frozenset[str]] = frozenset({"parts"})
    may_be_incomplete: ClassVar[bool] = True
    names: tuple[str, ...] = Field(min_length=2)
    parts: tuple[SerializeAsAny[Task], ...]

    @field_validator("parts", mode="before")
    @classmethod
    def _built(cls, parts: Sequence[Any]) -> tuple[Task, ...]:
        return tuple(load_task(part) if isinstance(part, Mapping) else part for part in parts)

    @classmethod
    def named_columns(cls, target: str) -> tuple[str, ...]:
        """Return all columns of ``grade; ordinal:isup; cox:time,event``."""
        return tuple(name for kind, part in _parts(target) for name in kind.named_columns(part))

    @classmethod
    def from_rows(cls, rows: Sequence[Row], target: str) -> Self:
        """Make the task of targets separated by semicolons, each ``KIND:TARGET``, or a column to be classified."""
        wanted = _parts(target)
        parts = [kind.from_rows(_known(rows, kind.named_columns(part)), part) for kind, part in wanted]
        names = tuple(part.columns[0] for part in parts)
        if len(set(names)) < len(names):
            raise LabelError(f"{target!r} names a column twice; list each target once")
        return cls(names=names, parts=tuple(parts))

    def same_question(self, other: Task) -> bool:
        """Return whether all parts ask the same."""
        if not isinstance(other, MultiTask) or self.names != other.names:
            return False
        return all(one.same_question(two) for one, two in zip(self.parts, other.parts, strict=True))

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns of all parts."""
        return tuple(name for part in self.parts for name in part.columns)

    @property
    def n_outputs(self) -> int:
        """The logits of all parts."""
        return sum(part.n_outputs for part in self.parts)

    def describe(self, rows: Sequence[Row]) -> str:
        """Return what each part says of the rows that have its values."""
        said = []
        for part in self.parts:
            known = _known(rows, part.columns)
            gaps = f", {len(rows) - len(known)} without" if len(known) < len(rows) else ""
            said.append(part.describe(known) + gaps)
        return "; ".join(said)

    def fit_to(self, target: Tensor) -> Self:
        """Fit each part to its known targets."""
        return self._with(part.fit_to(known) for part, known, _ in self._sliced(target))

    def encode(self, rows: Sequence[Row]) -> Tensor:
        """Return the targets of all parts side by side, (B, T) float64, NaN where a value is missing."""
        columns = [self._encode_part(part, rows) for part in self.parts]
        return torch.cat(columns, 1)

    def _encode_part(self, part: Task, rows: Sequence[Row]) -> Tensor:
        there = [number for number, row in enumerate(rows) if _complete(row, part.columns)]
        known = part.encode([rows[number] for number in there])
        # float64 holds the class numbers of one part and the times of another exactly
        filled = torch.full((len(rows), _width(part)), float("nan"), dtype=torch.float64)
        filled[there] = known.reshape(len(there), -1).double()
        return filled

    def decode(self, target: NDArray[Any]) -> list[NDArray[Any]]:
        """Return the values of each column, empty where they are missing."""
        columns = []
        for part, known, there in self._sliced(torch.from_numpy(target)):
            for values in part.decode(known.numpy()):
                column = np.full(len(target), "", dtype=object)
                column[there.numpy()] = values
                columns.append(column)
        return columns

    def bag_losses(self, logits: Tensor, target: Tensor) -> Tensor:
        """Return the sum of the known targets' losses over the number of parts, (B,)."""
        total = wide(logits).sum(1) * 0  # keeps a bag without a known target in the graph
        for (part, known, there), own in zip(self._sliced(target), self._logits(logits), strict=True):
            if len(known):
                total = total.index_add(0, there, part.bag_losses(own[there], known).to(total.dtype))
        return total / len(self.parts)

    @property
    def compares_bags(self) -> bool:
        """Whether any part does."""
        return any(part.compares_bags for part in self.parts)

    def across_packs(self, step: StepLosses) -> Task:
        """Return the task with the parts that compare bags across packs; itself when none does."""
        return self._with(part.across_packs(step) for part in self.parts) if self.compares_bags else self

    @property
    def tunable(self) -> frozenset[str]:
        """What any part has."""
        return frozenset().union(*(part.tunable for part in self.parts))

    def _untunable(self, name: str) -> str:
        return f"none of the targets {', '.join(self.names)} has a {name}"

    def tuned(self, logits: Tensor, target: Tensor, *, threshold: bool = False, temperature: bool = False) -> Self:
        """Return the task with each part tuned, in what the part has, on the bags whose target of it is known."""
        self.require_tunable(threshold=threshold, temperature=temperature)
        return self._with(
            part.tuned(
                own[there],
                known,
                threshold=threshold and "threshold" in part.tunable,
                temperature=temperature and "temperature" in part.tunable,
            )
            for (part, known, there), own in zip(self._sliced(target), self._logits(logits), strict=True)
        )

    def with_mean_threshold(self, tasks: Sequence[Task]) -> Self:
        """Return the task with the mean thresholds of each part."""
        several = [task.parts for task in tasks if isinstance(task, MultiTask)]
        return self._with(
            part.with_mean_threshold(others)
            for part, others in zip(self.parts, zip(*several, strict=True), strict=True)
        )

    def without_scale(self) -> Self:
        """Return the task with every part without its scale."""
        return self._with(part.without_scale() for part in self.parts)

    def mean_logits(self, tasks: Sequence[Self], logits: Sequence[Tensor]) -> Tensor:
        """Return the logits of the mean answers of each part, side by side."""
        own = [task._logits(one) for task, one in zip(tasks, logits, strict=True)]
        means = [
            part.mean_logits([task.parts[k] for task in tasks], [parts[k] for parts in own])
            for k, part in enumerate(self.parts)
        ]
        return torch.cat([mean.to(logits[0].dtype) for mean in means], 1)

    def require_trainable(self, target: Tensor) -> None:
        """Refuse what a part could not learn from its known targets."""
        for (part, known, _), name in zip(self._sliced(target), self.names, strict=True):
            if not len(known):
                raise LabelError(f"no training slide has a value of {name!r}; use fewer folds, or leave the target out")
            part.require_trainable(known)

    def activate(self, logits: Tensor) -> Floats:
        """Return the activated outputs of all parts side by side."""
        outputs = [part.activate(own) for part, own in zip(self.parts, self._logits(logits), strict=True)]
        return np.concatenate(outputs, 1)

    def table(self, outputs: Floats) -> Columns:
        """Return the columns of each part, ``<name>_`` before them."""
        columns: Columns = {}
        for name, part, own in zip(self.names, self.parts, self._outputs(outputs), strict=True):
            columns |= {f"{name}_{column}": values for column, values in part.table(own).items()}
        return columns

    @property
    @override
    def verdicts(self) -> tuple[str, ...]:
        pairs = zip(self.names, self.parts, strict=True)
        return tuple(f"{name}_{column}" for name, part in pairs for column in part.verdicts)

    @property
    def spread_columns(self) -> tuple[str, ...]:
        """``<name>_uncertainty`` of each part: their outputs have no unit in common."""
        return tuple(
            f"{name}_{column}"
            for name, part in zip(self.names, self.parts, strict=True)
            for column in part.spread_columns
        )

    def spread(self, outputs: Floats) -> dict[str, float]:
        """Return how much several models differ in each part."""
        spreads = [part.spread(own) for part, own in zip(self.parts, self._outputs(outputs), strict=True)]
        return dict(zip(self.spread_columns, (value for spread in spreads for value in spread.values()), strict=True))

    def read_outputs(self, columns: Mapping[str, Sequence[str]]) -> Floats:
        """Return the outputs of all parts side by side."""
        own = self._columns(columns)
        return np.concatenate([part.read_outputs(table) for part, table in zip(self.parts, own, strict=True)], 1)

    def _columns(self, columns: Mapping[str, Sequence[str]]) -> list[dict[str, Sequence[str]]]:
        """Return the columns of each part under its own names."""
        return [
            {name.removeprefix(f"{first}_"): values for name, values in columns.items() if name.startswith(f"{first}_")}
            for first in self.names
        ]

    def decide(self, outputs: Floats) -> NDArray[np.int64]:
        """Return the decisions of all parts side by side, (B, decisions); a part without classes has none."""
        decided = [part.decide(own) for part, own in zip(self.parts, self._outputs(outputs), strict=True)]
        return np.concatenate([_flat(own) for own in decided], 1)

    def read_decided(self, columns: Mapping[str, Sequence[str]]) -> NDArray[np.int64]:
        """Return what was decided, as `decide` does, from the columns of `table` as text."""
        own = self._columns(columns)
        return np.concatenate([_flat(part.read_decided(table)) for part, table in zip(self.parts, own, strict=True)], 1)

    def _decisions(self, decided: NDArray[np.int64]) -> list[NDArray[np.int64]]:
        """Return the decisions of each part as the part makes them."""
        empty = [part.decide(part.activate(torch.zeros(0, part.n_outputs))) for part in self.parts]
        ends = np.cumsum([_flat(own).shape[1] for own in empty])[:-1]
        split = np.split(decided, ends, axis=1)
        return [own[:, 0] if shape.ndim == 1 else own for own, shape in zip(split, empty, strict=True)]

    def metrics(
        self,
        outputs: Floats,
        target: NDArray[Any],
        decided: NDArray[np.int64] | None = None,
        *,
        folds: NDArray[np.int64] | None = None,
    ) -> Metrics:
        """Return the metrics of each part over its known targets, ``<name>_`` before them, and ``score``."""
        found: Metrics = {}
        chosen: dict[str, float | None] = {}
        for name, part, own, known, made, there in self.by_part(outputs, target, decided):
            of_part = None if folds is None else folds[there]
            metrics = part.metrics(own, known, made, folds=of_part) if len(known) else {}
            chosen[f"{name}_{part.selection_metric}"] = metrics.get(part.selection_metric)
            found |= {f"{name}_{metric}": value for metric, value in metrics.items()}
        return {"score": mean_if_defined(list(chosen.values()))} | chosen | found

    def supports(self, target: NDArray[Any]) -> dict[str, Support]:
        """Return what the measures of each part rest on, ``<name>_`` before them."""
        found: dict[str, Support] = {}
        for name, (part, known, there) in zip(self.names, self._sliced(torch.from_numpy(target)), strict=True):
            for metric, support in part.supports(known.numpy()).items():
                groups = tuple(_among(there.numpy(), group, len(target)) for group in support.groups)
                found[f"{name}_{metric}"] = Support(groups, support.low, support.high)
        return found

    def surprise(self, outputs: Floats, target: NDArray[Any], *, folds: NDArray[np.int64] | None = None) -> Floats:
        """Return the mean rank, from 0 to 1, of the surprise of the known targets."""
        ranks = np.full((len(target), len(self.parts)), np.nan)
        for number, (_, part, own, known, _, there) in enumerate(self.by_part(outputs, target)):
            values = part.surprise(own, known, folds=None if folds is None else folds[there])
            ranks[there, number] = np.argsort(np.argsort(values)) / max(len(values) - 1, 1)
        known_parts = np.isfinite(ranks).sum(1)
        blank = np.full(len(target), np.nan)
        means: Floats = np.divide(np.nansum(ranks, 1), known_parts, out=blank, where=known_parts > 0)
        return means

    def pooled(self, tasks: Sequence[Self], outputs: Sequence[Floats]) -> tuple[Self, Floats]:
        """Pool each part."""
        made = [
            part.pooled([task.parts[k] for task in tasks], [self._outputs(own)[k] for own in outputs])
            for k, part in enumerate(self.parts)
        ]
        return self._with(part for part, _ in made), np.concatenate([own for _, own in made], 1)

    def strata(self, rows: Sequence[Row]) -> list[str]:
        """Return the strata of the first target; rows without it are a stratum of their own."""
        part = self.parts[0]
        known = [number for number, row in enumerate(rows) if _complete(row, part.columns)]
        strata = [MISSING] * len(rows)
        for number, stratum in zip(known, part.strata([rows[number] for number in known]), strict=True):
            strata[number] = stratum
        return strata

    def soft_strata(self, rows: Sequence[Row]) -> frozenset[str]:
        """Return those of the first target, and that of the rows without it."""
        part = self.parts[0]
        return part.soft_strata([row for row in rows if _complete(row, part.columns)]) | {MISSING}

    def by_part(
        self, outputs: Floats, target: NDArray[Any], decided: NDArray[np.int64] | None = None
    ) -> list[tuple[str, Task, Floats, NDArray[Any], NDArray[np.int64], NDArray[np.int64]]]:
        """Return for each part: name, itself, outputs, known targets and decisions, and the rows that have these."""
        sliced = self._sliced(torch.from_numpy(np.asarray(target)))
        made = self._decisions(self.decide(outputs) if decided is None else decided)
        return [
            (name, part, own[there.numpy()], known.numpy(), mine[there.numpy()], there.numpy())
            for name, (part, known, there), own, mine in zip(
                self.names, sliced, self._outputs(outputs), made, strict=True
            )
        ]

    def _with(self, parts: Iterable[Task]) -> Self:
        return self.model_copy(update={"parts": tuple(parts)})

    def _logits(self, logits: Tensor) -> list[Tensor]:
        return list(logits.split([part.n_outputs for part in self.parts], 1))  # type: ignore[no-untyped-call]

    def _outputs(self, outputs: Floats) -> list[Floats]:
        widths = [part.activate(torch.zeros(1, part.n_outputs)).shape[1] for part in self.parts]
        return np.split(outputs, np.cumsum(widths)[:-1], axis=1)

    def _sliced(self, target: Tensor) -> list[tuple[Task, Tensor, Tensor]]:
        """Return for each part: itself, its known targets as it encodes them, and their rows."""
        found = []
        for part, own in zip(self.parts, target.split([_width(p) for p in self.parts], 1), strict=True):  # type: ignore[no-untyped-call]
            there = torch.nonzero(own.isfinite().all(1))[:, 0]
            empty = part.encode([])
            known = own[there].to(empty.dtype)
            found.append((part, known[:, 0] if empty.ndim == 1 else known, there))
        return found


def _among(rows: NDArray[np.int64], flags: NDArray[np.bool_], n: int) -> NDArray[np.bool_]:
    """Return (n,) flags from those of some of the rows."""
    spread = np.zeros(n, bool)
    spread[rows[flags]] = True
    return spread


def _width(part: Task) -> int:
    empty = part.encode([])
    return 1 if empty.ndim == 1 else empty.shape[1]


def _flat(decided: NDArray[np.int64]) -> NDArray[np.int64]:
    return decided[:, None] if decided.ndim == 1 else decided


def _parts(target: str) -> list[tuple[type[Task], str]]:
    """Return the kind and the target of each part."""
    found: list[tuple[type[Task], str]] = []
    for text in target.split(";"):
        kind, colon, rest = text.strip().partition(":")
        if text.strip():
            found.append((TASKS[kind.strip()], rest.strip()) if colon else (TASKS["classification"], kind))
    if len(found) < 2:
        raise LabelError(f"multitask needs at least two targets, separated by semicolons; found {target!r}")
    return found


def _known(rows: Sequence[Row], columns: Sequence[str]) -> list[Row]:
    known = [row for row in rows if _complete(row, columns)]
    if not known:
        raise LabelError(f"no slide has a value in column {' and '.join(columns)}; leave this target out")
    return known


def _complete(row: Row, columns: Sequence[str]) -> bool:
    return all(has_value(row[name]) for name in columns)
