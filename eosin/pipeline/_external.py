"""Figures of an external cohort: predictions beside a table of labels, over the slides that no model has seen.

The labels may have other columns and other spellings than those of the training; classes are those of the model. What
is measured, over whom, and what became of every other slide is the same in the terminal, in JSON and in the report.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from eosin import __version__
from eosin._columns import PATIENT_COLUMNS, detect_column, slide_column
from eosin._files import write_json
from eosin._names import Ids, plain_word
from eosin._tables import first_few, read_table
from eosin.errors import LabelError
from eosin.mil._checkpoint import load_card
from eosin.mil._crossval import Fold, by_patient, pooled_figures
from eosin.mil._evaluate import RESAMPLES, Estimate, bootstrap
from eosin.mil._flow import Flow
from eosin.mil._predict import Predictions, write_account
from eosin.mil._seen import PARTS, SEEN, Models
from eosin.mil._study import open_labels
from eosin.mil._tables import LabelTable
from eosin.mil._target import has_value, same_class
from eosin.mil.task import Row, Task
from eosin.report._evaluation import Context, evaluation_report
from eosin.report._measures import Evaluated, led_by, metric_name
from eosin.report._page import write_report

SEEN_PARTS = ("trained", "validated")
SEEN_TABLE = "What the models that answer have seen of the labelled slides"
SHOWN_METRICS = 4
NO_PATIENTS = "the table names no patients, so each slide counts as a patient in the intervals"


@dataclass(frozen=True)
class Truth:
    """The labels of an external cohort.

    Attributes
    ----------
    table : LabelTable
    target : str, optional
        Columns of the label where they are not called as in the training.
    with_seen : bool
        Whether slides that have shaped a model count, too.
    ids : {"ask", "merge", "exact"}
        What becomes of ids that look alike.
    """

    table: LabelTable
    target: str | None = None
    with_seen: bool = False
    ids: Ids = "ask"

    @classmethod
    def read(cls, path: Path, *, target: str | None = None, with_seen: bool = False, ids: Ids = "ask") -> "Truth":
        """Read a table of labels; where it has no patients each slide is its own. Errors as of `open_labels`."""
        names = dict(read_table(path))
        names.pop(slide_column(names) or "", None)
        if detect_column(names, PATIENT_COLUMNS) is not None:
            return cls(open_labels(path, ids=ids), target, with_seen, ids)
        table = open_labels(path, group="slide", ids=ids)
        return cls(replace(table, notes=(*table.notes, NO_PATIENTS)), target, with_seen, ids)

    def check(self, models: Sequence[Path]) -> None:
        """Refuse labels that the models do not know, before anything is predicted.

        Raises
        ------
        LabelError
            If the table lacks the label, or a value is none of the model's.
        """
        task = load_card(Models.open(models).folders[0]).load_task()
        self.encode(task, self.labelled(task))

    def labelled(self, task: Task) -> list[dict[str, str]]:
        """Return the rows that have a label."""
        columns, enough = self.columns(task), any if task.may_be_incomplete else all
        return [row for row in self.table.rows() if enough(has_value(row[name]) for name in columns)]

    def columns(self, task: Task) -> tuple[str, ...]:
        """Return the columns of the label, in the order of the task's.

        Raises
        ------
        LabelError
            If there are none of these names.
        """
        wanted = task.columns if self.target is None else task.named_columns(self.target)
        known = {plain_word(name): name for name in self.table.values}
        absent = [name for name in wanted if plain_word(name) not in known]
        if absent or len(wanted) != len(task.columns):
            told = first_few(list(self.table.values), most=10) or "none"
            raise LabelError(
                f"the label of these models is in {' and '.join(map(repr, task.columns))}, which the table of labels "
                f"does not have; it has {told}; pass --target with its columns in the same order"
            )
        return tuple(known[plain_word(name)] for name in wanted)

    def encode(self, task: Task, rows: Sequence[Row]) -> Tensor:
        """Return the targets of rows as the task of the models means them; errors as of `Task.encode`."""
        columns = self.columns(task)
        if task.kind in ("survival", "cox"):  # which value is an event is a matter of this table
            return type(task).from_rows(rows, self.target or ",".join(columns)).encode(rows)
        named = [
            dict(zip(task.columns, (_spelled(task, row[name]) for name in columns), strict=True)) | {"slide_id": ""}
            for row in rows
        ]
        return task.encode(named)


def _spelled(task: Task, value: str) -> str:
    """Return a class as the model calls it, whatever its capitals and blanks are here."""
    classes: Sequence[str] = getattr(task, "classes", ())
    alike = [name for name in classes if same_class(name) == same_class(value)]
    return alike[0] if len(alike) == 1 and value not in classes else value


@dataclass(frozen=True, eq=False)
class Figures:
    """What predictions are worth.

    Attributes
    ----------
    task : Task
    frame : DataFrame
        The labelled predictions that were judged.
    measured : mapping of str to Estimate
        Over slides.
    by_patient : mapping
        The same by patient; empty where each patient has one slide.
    seen : mapping of str to int
        Labelled slides by what the models that answer have seen of them.
    n_seen : int
        Judged slides that have shaped the models.
    notes : tuple of str
    flow : Flow
    """

    task: Task
    frame: pd.DataFrame
    measured: Mapping[str, Estimate]
    by_patient: Mapping[str, Any]
    seen: Mapping[str, int]
    n_seen: int
    notes: tuple[str, ...]
    flow: Flow

    @property
    def whom(self) -> str:
        """Who the slides are, in words."""
        return (
            f"({self.n_seen} of the slides have shaped the models)" if self.n_seen else "that the models have not seen"
        )

    @property
    def over(self) -> str:
        """What the figures are about, in words."""
        patients = self.frame["patient_id"].nunique() if len(self.frame) else 0
        return f"{len(self.frame)} slides of {patients} patients {self.whom}"

    def as_json(self) -> dict[str, Any]:
        """Return what ``<table>_metrics.json`` holds."""
        facts: dict[str, Any] = {
            "task": self.task.model_dump(mode="json"),
            "over": self.over,
            "seen": dict(self.seen),
            "metrics": {name: estimate.as_json() for name, estimate in self.measured.items()},
        }
        if self.by_patient:
            facts["patients"] = dict(self.by_patient)
        return facts | {"notes": list(self.notes), "cohort": self.flow.as_json()}

    def files(self, out: Path) -> list[Path]:
        """Return what `judge_external` has written for a table."""
        names = ("metrics.json", "report.html") if len(self.frame) else ("metrics.json",)
        return [out.with_name(f"{out.stem}_{name}") for name in names]

    def lines(self) -> Iterator[str]:
        """Return the account, the main figures and what to know about them, for a terminal."""
        yield from self.flow.lines()
        yield from (f"warning: {note}" for note in self.notes)
        shown = led_by(self.task.selection_metric, self.measured)
        wanted = [name for name in shown if name in ("sensitivity", "specificity")]
        names = list(dict.fromkeys([*list(shown)[:1], *wanted, *shown]))[:SHOWN_METRICS]
        figures = ", ".join(f"{metric_name(name)} {_in_words(shown[name])}" for name in names)
        yield f"figures over {self.over}: {figures or 'none'}"


def _in_words(found: Estimate) -> str:
    if found.value is None:
        return "undefined"
    interval = "" if found.lower is None else f" ({found.lower:.3f} to {found.upper:.3f})"
    return f"{found.value:.3f}{interval}"


def judge_external(out: Path, predictions: Predictions, truth: Truth) -> Figures:
    """Measure predictions by labels; write ``<table>_metrics.json``, ``<table>_report.html`` and the account.

    Parameters
    ----------
    out : Path
        The table of predictions.
    predictions : Predictions
        As `eosin.mil._predict.predict` returns them.
    truth : Truth

    Raises
    ------
    LabelError
        If the table lacks the label, a value is none of the model's, or it names no slide that was predicted.
    OutputError
        If a file cannot be written.
    """
    task, rows = predictions.task, predictions.rows
    truth = replace(truth, table=truth.table.named_as(predictions.flow.slide_ids, truth.ids))
    there = {row["slide_id"]: row for row in truth.labelled(task)}
    labelled = list(there)
    judged = [slide for slide in labelled if rows.get(slide, {}).get("status") == "ok"]
    if not judged:
        raise LabelError(
            f"none of the {len(labelled)} labelled slides was predicted; the table has {first_few(labelled)}, "
            f"predicted were {first_few(list(rows))}"
        )
    seen: dict[str, int] = {part: sum(rows[slide]["seen"] == part for slide in judged) for part in PARTS}
    new = [slide for slide in judged if rows[slide]["seen"] not in SEEN_PARTS]
    used = judged if truth.with_seen else new
    flow = predictions.flow.joined(labelled, patient_of=truth.table.patient_of())
    flow = flow.lose("found", {slide: "has no slide or feature file" for slide in labelled if slide not in rows})
    flow = flow.keep("labelled", labelled, "has no label")
    flow = flow.keep("unseen", used, "has shaped the model that answers")
    frame, measured, patients = _measured(truth, task, [there[slide] for slide in used], rows)
    figures = Figures(task, frame, measured, patients, seen, len(used) - len(new), _notes(truth, seen), flow)
    write_account(out, flow)
    for path in figures.files(out):
        if path.suffix == ".json":
            write_json(path, figures.as_json())
        else:
            write_report(path, evaluation_report(*_for_report(figures, truth)))
    return figures


def _notes(truth: Truth, seen: Mapping[str, int]) -> tuple[str, ...]:
    shaped = sum(seen[part] for part in SEEN_PARTS)
    notes = [NO_PATIENTS] if NO_PATIENTS in truth.table.notes else []
    if shaped and truth.with_seen:
        notes.append(f"{shaped} slides, or their patients, have shaped the models; figures with them are too good")
    elif shaped:
        notes.append(
            f"{shaped} slides, or their patients, have shaped the models that answer and do not count; "
            "pass --with-seen to count them"
        )
    if seen["unknown"]:
        notes.append(
            f"a model does not state its training slides (no {SEEN}); {seen['unknown']} slides may be among them"
        )
    return tuple(notes)


def _measured(
    truth: Truth, task: Task, rows: Sequence[dict[str, str]], predicted: Mapping[str, Mapping[str, Any]]
) -> tuple[pd.DataFrame, dict[str, Estimate], dict[str, Any]]:
    """Return the labelled predictions as a table, and every figure over slides and over patients."""
    if not rows:
        return pd.DataFrame(), {}, {}
    targets = truth.encode(task, rows).numpy()
    names = list(task.table(task.activate(torch.zeros(1, task.n_outputs))))
    answers = [predicted[row["slide_id"]] for row in rows]
    cells = {
        "fold": [str(answer["answered_by"]) for answer in answers],
        **{name: [row[name] for row in rows] for name in ("slide_id", "patient_id")},
        **{name: values.astype(str) for name, values in zip(task.columns, task.decode(targets), strict=True)},
        **{name: [str(answer[name]) for answer in answers] for name in names},
    }
    frame = pd.DataFrame(cells)
    found = Evaluated.of(task, frame)
    measured = bootstrap(
        task, found.outputs, targets, found.patients, decided=found.decided, folds=found.folds
    )  # fmt: skip
    folds = [_fold(task, found, targets, np.flatnonzero(found.folds == k)) for k in range(found.folds.max() + 1)]
    patients = by_patient(folds)
    return frame, measured, pooled_figures(task, patients, RESAMPLES) if patients else {}


def _fold(task: Task, found: Evaluated, targets: Any, rows: Any) -> Fold:
    """Return the rows that the same models answered as a fold of a cross-validation."""
    slides, patients = (tuple(found.frame[name].iloc[rows]) for name in ("slide_id", "patient_id"))
    return Fold(0, slides, patients, found.outputs[rows], targets[rows], {}, task)


def _for_report(figures: Figures, truth: Truth) -> tuple[dict[str, Any], pd.DataFrame, Task, Context]:
    """Return the figures in the form that the report of a cross-validation has."""
    metrics: dict[str, Any] = {
        "out_of_fold": {name: estimate.as_json() for name, estimate in figures.measured.items()},
        "folds": [],
        "metrics": {},
        "n_folds": 0,
    }
    if figures.by_patient:
        metrics["patients"] = figures.by_patient
    column = truth.table.site_column()
    sites = {} if column is None else dict(zip(truth.table.slide_ids, truth.table.values[column], strict=True))
    seen = pd.DataFrame([{"Seen": part, "Slides": number} for part, number in figures.seen.items()])
    context = Context(
        title="External cohort",
        summary=f"{figures.whom}, predicted by trained models.",
        sites=sites,
        notes=tuple(f"{note[:1].upper()}{note[1:]}." for note in figures.notes),
        tables={SEEN_TABLE: seen},
        provenance={"eosin": __version__, "table": "; ".join(truth.table.notes)},
        flow=figures.flow,
    )
    return metrics, figures.frame, figures.task, context
