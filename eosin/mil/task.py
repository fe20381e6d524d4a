"""What every task must say: how a label is encoded, learnt, predicted and judged."""

import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from eosin._tables import decimal_point
from eosin.errors import ConfigError, LabelError
from eosin.mil._intervals import Support
from eosin.mil._metrics import Floats, Metrics
from eosin.mil._registry import Registry
from eosin.mil._step_losses import StepLosses
from eosin.mil._tables import shown
from eosin.mil._target import has_value
from eosin.options import Options

__all__ = ["TASKS", "Columns", "Row", "Task", "load_task", "make_task"]

Row = Mapping[str, str]
Columns = dict[str, NDArray[Any]]
UNCERTAINTY = "uncertainty"
THOUSANDS_OR_DECIMALS = re.compile(r"[-+]?[1-9]\d{0,2}(,\d{3})+")
COMMA_LAST = re.compile(r"[-+]?\d{1,3}(\.\d{3})+,\d+")  # 1.234,5
POINT_LAST = re.compile(r"[-+]?\d{1,3}(,\d{3})+\.\d+")  # 1,234.5


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
    may_be_incomplete : bool
        Whether a row may lack a value in some of the columns.
    """

    kind: str
    selection_metric: ClassVar[str]
    learnt: ClassVar[frozenset[str]] = frozenset()
    may_be_incomplete: ClassVar[bool] = False

    def same_question(self, other: "Task") -> bool:
        """Return whether two tasks differ at most in what was learnt from training or validation parts."""
        return self.model_dump(exclude=set(self.learnt)) == other.model_dump(exclude=set(other.learnt))

    @property
    def tunable(self) -> frozenset[str]:
        """What `tuned` can choose: ``threshold``, ``temperature``."""
        return frozenset()

    def require_tunable(self, *, threshold: bool, temperature: bool) -> None:
        """Refuse a threshold or temperature that the task does not have, before anything is trained.

        Raises
        ------
        ConfigError
            Naming it.
        """
        asked = {"threshold": threshold, "temperature": temperature}
        for name in (name for name, wanted in asked.items() if wanted and name not in self.tunable):
            raise ConfigError(f"{self._untunable(name)}; set training.{name} to false")

    def _untunable(self, name: str) -> str:
        return f"task {self.kind} has no {name}"

    def tuned(self, logits: Tensor, target: Tensor, *, threshold: bool = False, temperature: bool = False) -> Self:
        """Return the task with what it takes from a model's logits on the validation part; see the task's own text.

        Raises
        ------
        ConfigError
            If the task has no threshold or temperature.
        """
        self.require_tunable(threshold=threshold, temperature=temperature)
        return self

    def with_mean_threshold(self, tasks: Sequence["Task"]) -> Self:
        """Return the task with the mean of the thresholds of several that ask the same, where these have one."""
        return self

    def without_scale(self) -> Self:
        """Return the task for logits of `mean_logits`, on whose scale several models agree."""
        return self

    def mean_logits(self, tasks: Sequence[Self], logits: Sequence[Tensor]) -> Tensor:
        """Return the logits of several models that answer as one, (B, K): `activate` makes of them the mean answer.

        The task itself is `without_scale`, and what is learnt in common: thresholds, edges.

        Parameters
        ----------
        tasks : sequence of Task
            This question, each with what its own training part taught.
        logits : sequence of (B, K) Tensor
            Of each task's model.

        Raises
        ------
        ConfigError
            If the answers of several models have no mean that logits can express.
        """
        raise ConfigError(
            f"{len(tasks)} models would have to answer together, because the slide was not in the cross-validation, "
            f"and those of the task {self.kind} cannot be asked as one; pass the folder of one fold"
        )

    @classmethod
    def named_columns(cls, target: str) -> tuple[str, ...]:
        """Return the columns of the label table that the text of a target names."""
        return (target,)

    @property
    def columns(self) -> tuple[str, ...]:
        """Columns of the label table that the target is made of."""
        raise NotImplementedError

    def describe(self, rows: Sequence[Row]) -> str:
        """Return how the labels of a table were understood, in one line for a person."""
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

    @property
    def compares_bags(self) -> bool:
        """Whether the loss of a bag depends on the other bags of the step."""
        return False

    def across_packs(self, step: StepLosses) -> "Task":
        """Return the task for steps of several packs: itself, unless its losses compare bags with each other."""
        return self

    def require_trainable(self, target: Tensor) -> None:
        """Raise `LabelError` when the targets of a training part leave something that could not be learnt."""

    def memberships(self, target: Tensor) -> Tensor:
        """Return (B, K) float: 1 where the class of an output is true, for terms that label instances or branches.

        Raises
        ------
        ConfigError
            If the task has no classes.
        """
        raise ConfigError(f"task {self.kind} has no classes, but this method needs them; use --task classification")

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

    @property
    def verdicts(self) -> tuple[str, ...]:
        """The columns of `table` that say in a word or a number what is predicted."""
        return ("predicted",)

    @property
    def spread_columns(self) -> tuple[str, ...]:
        """The columns of `spread`."""
        return (UNCERTAINTY,)

    def spread(self, outputs: Floats) -> dict[str, float]:
        """Return how much several models differ, (models, outputs): their standard deviation, mean over the outputs."""
        return {UNCERTAINTY: float(outputs.std(0, ddof=1).mean())}

    def read_outputs(self, columns: Mapping[str, Sequence[str]]) -> Floats:
        """Return activated outputs again from the columns of `table` as text, (B, outputs)."""
        names = list(self.table(np.zeros((1, self.n_outputs))))
        return np.stack([np.asarray(columns[name], np.float64) for name in names[: self.n_outputs]], 1)

    def decide(self, outputs: Floats) -> NDArray[np.int64]:
        """Return what is predicted where that is a class, (B,) or (B, labels); without columns where it is not."""
        return np.zeros((len(outputs), 0), np.int64)

    def read_decided(self, columns: Mapping[str, Sequence[str]]) -> NDArray[np.int64]:
        """Return what was decided, as `decide` does, from the columns of `table` as text: by the thresholds of then."""
        return self.decide(self.read_outputs(columns))

    def metrics(
        self,
        outputs: Floats,
        target: NDArray[Any],
        decided: NDArray[np.int64] | None = None,
        *,
        folds: NDArray[np.int64] | None = None,
    ) -> Metrics:
        """Return every metric of activated outputs by name; None where the data do not define it.

        Parameters
        ----------
        outputs : (n, outputs) float
        target : (n, ...) array
        decided : (n, ...) int, optional
            Decisions that were made already, by the thresholds of several models; `decide` makes them otherwise.
        folds : (n,) int, optional
            Fold, and so model, that each row is from. Outputs without a scale that models share, the risks of Cox
            models, are compared within a fold only.
        """
        raise NotImplementedError

    def supports(self, target: NDArray[Any]) -> dict[str, Support]:
        """Return what each bounded measure of `metrics` rests on; the others have intervals of percentiles."""
        return {}

    def surprise(self, outputs: Floats, target: NDArray[Any], *, folds: NDArray[np.int64] | None = None) -> Floats:
        """Return how far each prediction is from the truth, (n,); higher is worse, NaN where it cannot be said.

        `folds` as of `metrics`.
        """
        raise NotImplementedError

    def pooled(self, tasks: Sequence[Self], outputs: Sequence[Floats]) -> tuple[Self, Floats]:
        """Return one task, and the outputs of several models one after the other in a form that it can judge.

        Parameters
        ----------
        tasks : sequence of Task
            This question, each with what its own training part taught.
        outputs : sequence of (n, outputs) float
            Of each task's model.
        """
        return self, np.concatenate(outputs)

    def strata(self, rows: Sequence[Row]) -> list[str]:
        """Return the stratum of each row, to balance splits; the values of a class label, bins of a number."""
        raise NotImplementedError

    def soft_strata(self, rows: Sequence[Row]) -> frozenset[str]:
        """Return the strata that are not classes, so that a part of a split may lack them."""
        return frozenset()


TASKS: Registry[type[Task]] = Registry("task", "eosin.mil.tasks")


def make_task(kind: str, rows: Sequence[Row], *, target: str = "label") -> Task:
    """Make the task that a label table poses.

    Parameters
    ----------
    kind : str
        ``classification``, ``binary``, ``ordinal``, ``multilabel``, ``regression``, ``survival``, ``cox`` or
        ``multitask``.
    rows : sequence of mappings
        Rows of the label table, values as text.
    target : str
        The label column; ``label=tumor`` to name the positive of two classes, ``grade=low<medium<high`` for grades
        whose order is not that of a number, ``a,b,c`` for the columns of ``multilabel``, ``time,event`` or
        ``time,event=VALUE`` for survival, and for ``multitask`` several of these with their kinds, ``er; ordinal:grade;
        cox:time,event``.

    Returns
    -------
    Task

    Raises
    ------
    UnknownNameError
        If there is no such task.
    LabelError
        If a column does not exist, a value is missing, or the labels do not pose such a task.
    """
    task = TASKS[kind]
    require_values(rows, task.named_columns(target), all_of_them=not task.may_be_incomplete)
    return task.from_rows(rows, target)


def load_task(data: Mapping[str, Any]) -> Task:
    """Build the task that `Task.model_dump` described.

    Parameters
    ----------
    data : mapping of str to object
        With the key ``kind``.

    Returns
    -------
    Task

    Raises
    ------
    ConfigError
        If the description fits no task.
    """
    kind = str(data.get("kind"))
    if kind not in TASKS:
        raise ConfigError(f"the description of the task is damaged: there is no task {kind!r}")
    return TASKS[kind].parse(data, source="the description of the task")


def require_classes(task: Task, part: str) -> None:
    """Raise `ConfigError` unless the task says to which classes a bag belongs."""
    if type(task).memberships is Task.memberships:
        raise ConfigError(f"{part} labels instances by class; task {task.kind} has none; leave the term out")


def wide(logits: Tensor) -> Tensor:
    """Return logits in float32 at least: losses and probabilities do not follow the autocast of the model."""
    return logits if logits.dtype == torch.float64 else logits.float()


def to_numpy(values: Tensor) -> Floats:
    """Return a tensor as float64 on the host."""
    array: Floats = values.detach().double().cpu().numpy()
    return array


def numbers(rows: Sequence[Row], column: str) -> list[float]:
    """Return the numbers in a column, with a decimal point or comma, and thousands set apart where that is certain.

    Raises
    ------
    LabelError
        With all cells that hold none, or could be read in two ways.
    """
    cells = [row[column] for row in rows]
    unclear = list(dict.fromkeys(cell for cell in cells if THOUSANDS_OR_DECIMALS.fullmatch(cell.strip())))
    if unclear:  # 1,234 is a thousand and some, or one and some
        raise LabelError(f"{_quoted(unclear)} in column {column!r} can be read in two ways; write it without a comma")
    found = [_number(cell) for cell in cells]
    bad = list(dict.fromkeys(cell for cell, value in zip(cells, found, strict=True) if not np.isfinite(value)))
    if bad:
        what = "is not a number" if len(bad) == 1 else "are not numbers"
        raise LabelError(f"{_quoted(bad)} in column {column!r} {what}; correct the label table")
    return found


def _number(cell: str) -> float:
    text = cell.strip().replace("\N{MINUS SIGN}", "-")
    for pattern, thousands in ((COMMA_LAST, "."), (POINT_LAST, ",")):
        if pattern.fullmatch(text):
            text = text.replace(thousands, "")
    try:
        return float(decimal_point(text))
    except ValueError:
        return float("nan")


def _quoted(cells: Sequence[str]) -> str:
    return shown([repr(cell) for cell in cells])


def rank_bins(values: NDArray[Any], n_bins: int) -> list[str]:
    """Return the quantile bin of each value by rank, as text: strata of a number."""
    order = np.argsort(np.argsort(values, kind="stable"), kind="stable")
    return [str(place * n_bins // len(values)) for place in order]


def require_values(rows: Sequence[Row], columns: Sequence[str], *, all_of_them: bool) -> None:
    """Refuse a table without these columns, and a row without a value in one (`all_of_them`) or in any of them.

    Raises
    ------
    LabelError
        Naming the columns or the slides.
    """
    known = rows[0] if rows else {}
    absent = [name for name in columns if name not in known]
    if absent:
        others = [name for name in known if name not in ("slide_id", "patient_id")]
        # a classification reads one column, and "time,event" is then its name
        several = all(part.strip().partition("=")[0] in known for part in absent[0].split(","))
        which = "; for several columns pass --task survival, cox or multilabel" if several else ""
        raise LabelError(f"the label table has no column {absent[0]!r}; it has {', '.join(others) or 'none'}{which}")
    check = all if all_of_them else any
    empty = [row.get("slide_id", "") for row in rows if not check(has_value(row[name]) for name in columns)]
    if empty:
        named = " or ".join(map(repr, columns)) if all_of_them else f"any of {', '.join(columns)}"
        raise LabelError(
            f"no value in column {named} for {shown(empty)} (empty, nan, unknown ...); "
            "delete these rows or complete the table"
        )
