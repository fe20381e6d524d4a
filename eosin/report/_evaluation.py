"""The report of an evaluation: what its predictions are worth, where they fail, and where they come from."""

import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import yaml
from numpy.typing import NDArray
from PIL import Image

from eosin import __version__
from eosin._spread import find_file
from eosin.mil._crossval import read_predictions
from eosin.mil._flow import Flow
from eosin.mil._metrics import Floats, confusion, expected_calibration_error
from eosin.mil._study import Study
from eosin.mil.task import Task, load_task
from eosin.mil.tasks._multitask import MultiTask
from eosin.report._figures import (
    Curve,
    Panel,
    calibration_panel,
    decision_panel,
    precision_recall_panel,
    roc_panel,
    scatter_panel,
    survival_panel,
)
from eosin.report._measures import (
    Evaluated,
    estimate_table,
    fold_table,
    led_by,
    metric_name,
    metric_rows,
    over_folds,
    site_table,
    threshold_table,
)
from eosin.report._model_card import model_card
from eosin.report._page import Confusion, Picture, ReportData, SlideCard, write_report

WORST = 12
THUMBNAIL_PX = 300
PATIENTS_HEADING = "By patient, the mean over the slides"
SHOWN_PREDICTIONS = 300


@dataclass(frozen=True, eq=False)
class Context:
    """What a report tells beside the figures.

    Attributes
    ----------
    title : str
    summary : str
        What was tested and how, before the main figure; that of a cross-validation when it is empty.
    sites : mapping of str to str
        Site of each slide; may be empty.
    thumbnails : Path, optional
        Folder of ``<slide>.jpg``.
    notes : sequence of str
        Limits that a reader must know.
    tables : mapping of str to DataFrame
        Further tables, for example a comparison.
    provenance : mapping of str to str
    flow : Flow, optional
        From the slides that were given to those that were used.
    """

    title: str = "Cross-validation"
    summary: str = ""
    sites: Mapping[str, str] = field(default_factory=dict)
    thumbnails: Path | None = None
    notes: Sequence[str] = ()
    tables: Mapping[str, pd.DataFrame] = field(default_factory=dict)
    provenance: Mapping[str, str] = field(default_factory=dict)
    flow: Flow | None = None


def report_crossval(
    out: Path, metrics: Mapping[str, Any], predictions: Path, study: Study, context: Context | None = None
) -> None:
    """Write the report of a cross-validation.

    Parameters
    ----------
    out : Path
        Of the HTML file.
    metrics : mapping
        As `eosin.mil._crossval.crossval` returns.
    predictions : Path
        Its ``predictions.csv``.
    study : Study
        Gives the notes, sites and features.
    context : Context, optional
        Further notes.

    Raises
    ------
    OutputError
        If the file cannot be written.
    """
    given = context or Context()
    frame = pd.DataFrame(read_predictions(predictions).columns)
    column = study.table.site_column()
    ids = study.table.slide_ids + study.table.patient_ids  # bags are slides or patients
    sites = {} if column is None else dict(zip(ids, study.table.values[column] * 2, strict=True))
    spec = study.examples.bags.spec
    facts = {
        "eosin": f"{__version__}, Python {platform.python_version()}, torch {torch.__version__}",
        "features": f"{spec.encoder} {spec.weights_hash}".strip() + (f", {spec.mpp:g} µm/px" if spec.mpp else ""),
        "tiles": "" if spec.patch_size is None else f"{spec.patch_size} px",
        "table": "; ".join(study.notes),
        "task": _as_yaml(metrics["task"]),
        "recipe": _as_yaml(metrics["recipe"]),
    }
    told = {name: text for name, text in (dict(given.provenance) | facts).items() if text}
    full = replace(given, sites=dict(given.sites) or sites, provenance=told)
    write_report(out, evaluation_report(metrics, frame, load_task(metrics["task"]), full))


def _as_yaml(data: Mapping[str, Any]) -> str:
    """Return options as YAML, a line per group: what ``--recipe FILE`` reads."""
    text: str = yaml.safe_dump(dict(data), default_flow_style=None, sort_keys=False, width=110, allow_unicode=True)
    return text.strip()


def evaluation_report(metrics: Mapping[str, Any], frame: pd.DataFrame, task: Task, context: Context) -> ReportData:
    """Put a cross-validation together for a person.

    Parameters
    ----------
    metrics : mapping
        As `eosin.mil._crossval.crossval` returns.
    frame : DataFrame
        Its ``predictions.csv``, every value as text.
    task : Task
    context : Context

    Returns
    -------
    ReportData
        For `eosin.report._page.write_report`.
    """
    found = Evaluated.of(task, frame)
    patients = len(set(found.patients))
    first = task.selection_metric
    tables = threshold_table(found)
    if len(metrics["folds"]) > 1:
        over = over_folds(led_by(first, metrics["metrics"]))
        tables |= {"Over folds": over, "Folds": fold_table(metrics["folds"], first)}
    if "patients" in metrics:
        tables = {PATIENTS_HEADING: estimate_table(led_by(first, metrics["patients"]))} | tables
    sites = site_table(found, context.sites)
    if sites is not None:
        tables["Sites"] = sites
    return ReportData(
        title=context.title,
        summary=_summary(metrics, task, found, context.summary),
        metrics=metric_rows(led_by(first, metrics["out_of_fold"])),
        metrics_note=(
            f"All {len(frame)} test predictions together, with 95 % intervals over {patients} patients; "
            "↓: lower is better. A measure that the data do not define is undefined."
            + _mean_note(task)
            + f" {positives(found)}"
        ).strip(),
        panels=panels(found),
        confusions=confusions(found),
        slides=worst_cards(found, context.thumbnails),
        slides_heading="Worst predictions",
        predictions=_rounded(frame.head(SHOWN_PREDICTIONS), found),
        tables=tables | dict(context.tables),
        notes=(*context.notes, *shortened(frame)),
        provenance=context.provenance,
        flow=context.flow,
        card=model_card(metrics, notes=context.notes) if "task" in metrics else (),  # not of an external cohort
    )


def _rounded(frame: pd.DataFrame, found: Evaluated) -> pd.DataFrame:
    """Return a table of predictions with its numbers as numbers, so that they are printed short."""
    made = found.task.table(found.outputs)
    numbers = [name for name, values in made.items() if values.dtype.kind == "f"]
    return frame.astype(dict.fromkeys(numbers, float))


def _mean_note(task: Task) -> str:
    if not isinstance(task, MultiTask):
        return ""
    parts = zip(task.names, task.parts, strict=True)
    measures = "; ".join(metric_name(f"{name}_{part.selection_metric}") for name, part in parts)
    return f" The mean over the targets uses: {measures}."


def positives(found: Evaluated) -> str:
    """Return which of two classes is the positive one, of each target that has two; empty where none has."""
    said = []
    for name, part in found.parts():
        classes: tuple[str, ...] = getattr(part.task, "classes", ())
        if len(classes) == 2:
            of_target = f" of {name}" if name else ""
            said.append(f"The positive class{of_target} is {classes[1]}, the other {classes[0]}.")
    return " ".join(said)


def shortened(frame: pd.DataFrame) -> list[str]:
    """Return a note that a report shows only the first predictions, where there are more."""
    if len(frame) <= SHOWN_PREDICTIONS:
        return []
    return [f"The first {SHOWN_PREDICTIONS} of {len(frame)} predictions are shown; predictions.csv holds all."]


def _summary(metrics: Mapping[str, Any], task: Task, found: Evaluated, how: str) -> str:
    slides, patients = found.frame["slide_id"].nunique(), len(set(found.patients))
    best = metrics["out_of_fold"].get(task.selection_metric, {})
    usual = (
        f"in {metrics['n_folds']} folds, each tested by a model that was trained on other patients and chosen "
        "without them."
    )
    text = f"{slides} slides of {patients} patients {how or usual}"
    if best.get("value") is None:
        return text
    interval = "" if best["lower"] is None else f" ({best['lower']:.3f} to {best['upper']:.3f})"
    return f"{text} {metric_name(task.selection_metric)}: {best['value']:.3f}{interval}."


def panels(found: Evaluated) -> tuple[Panel, ...]:
    """Return the figures that suit the task: curves, calibration, survival, scatter; for each target of several."""
    drawn = [panel for name, part in found.parts() for panel in _panels(part, f"{name}: " if name else "")]
    return tuple(panel for panel in drawn if panel is not None)


def _panels(part: Evaluated, name: str) -> list[Panel | None]:
    classes: tuple[str, ...] = getattr(part.task, "classes", ())
    if classes:
        return _class_panels(part, classes, name)
    if part.task.kind == "multilabel":
        labels: tuple[str, ...] = part.task.columns
        curves = [Curve(label, part.targets[:, k] == 1, part.outputs[:, k]) for k, label in enumerate(labels)]
        return [
            roc_panel(curves, title=f"{name}ROC"),
            precision_recall_panel(curves, title=f"{name}Precision and recall"),
            *(_calibration(curve, f"{name}Calibration, {curve.name}") for curve in curves[:4]),
        ]
    if part.task.kind == "regression":
        return [scatter_panel(part.targets.astype(float), part.outputs[:, 0], title=f"{name}Predicted and true")]
    return [survival_panel(*_risk_groups(part), title=f"{name}Survival by predicted risk")]


def _calibration(curve: Curve, title: str) -> Panel | None:
    return calibration_panel(curve, error=expected_calibration_error(curve.score, curve.truth), title=title)


def _risk_groups(part: Evaluated) -> tuple[NDArray[np.bool_], Floats, NDArray[np.bool_]]:
    """Return for each patient whether the mean risk is above the fold's median, the time, and if it is an event."""
    patients = pd.DataFrame(
        {
            "fold": part.frame["fold"].to_numpy(),
            "patient": part.frame["patient_id"].to_numpy(),
            "risk": part.frame[_column(part.frame, part.task, "risk")].astype(float).to_numpy(),
            "time": part.targets[:, 0],
            "event": part.targets[:, 1],
        }
    )
    means = patients.groupby(["fold", "patient"]).mean()
    high = means["risk"] > means["risk"].groupby("fold").transform("median")
    return high.to_numpy(), means["time"].to_numpy(), means["event"].to_numpy() > 0


def _column(frame: pd.DataFrame, task: Task, name: str) -> str:
    return name if name in frame else f"{task.columns[0]}_{name}"


def _class_panels(part: Evaluated, classes: Sequence[str], name: str) -> list[Panel | None]:
    shown = [1] if len(classes) == 2 else range(len(classes))
    curves = [Curve(classes[k], part.targets == k, part.outputs[:, k]) for k in shown]
    error = part.task.metrics(part.outputs, part.targets)["ece"]
    if len(classes) == 2:
        calibrated = Curve(f"Probability of {classes[1]}", curves[0].truth, curves[0].score)
        error_of = " of the more probable class"
    else:
        top = part.outputs.argmax(1)
        calibrated = Curve("Probability of the most probable class", top == part.targets, part.outputs.max(1))
        error_of = ""
    found = [
        roc_panel(curves, title=f"{name}ROC"),
        precision_recall_panel(curves, title=f"{name}Precision and recall"),
        calibration_panel(calibrated, error=error, error_of=error_of, title=f"{name}Calibration"),
    ]
    if len(classes) == 2:
        patients = part.frame["patient_id"].astype(str).tolist()
        found.append(decision_panel(calibrated, patients, title=f"{name}Decision curve"))
    return found


def confusions(found: Evaluated) -> tuple[Confusion, ...]:
    """Return counts of true and predicted classes, for each target that has classes."""
    made = []
    for name, part in found.parts():
        classes: tuple[str, ...] = getattr(part.task, "classes", ())
        if classes:
            predicted = part.frame[_column(part.frame, part.task, "predicted")]
            numbers = np.array([classes.index(str(value)) for value in predicted])
            made.append(Confusion(name, classes, confusion(part.targets, numbers, len(classes))))
    return tuple(made)


def worst_cards(found: Evaluated, thumbnails: Path | None) -> tuple[SlideCard, ...]:
    """Return the slides whose predictions are farthest from the truth, with their thumbnails where there are any."""
    return tuple(_worst_card(found, row, thumbnails) for row in worst_rows(found, WORST))


def worst_rows(found: Evaluated, most: int) -> list[int]:
    """Return the rows of the predictions that are farthest from the truth, worst first."""
    surprise = found.task.surprise(found.outputs, found.targets, folds=found.folds)
    known = np.flatnonzero(np.isfinite(surprise))
    rows: list[int] = known[np.argsort(-surprise[known], kind="stable")][:most].tolist()
    return rows


def _worst_card(found: Evaluated, row: int, thumbnails: Path | None) -> SlideCard:
    cells = {str(name): str(value) for name, value in found.frame.iloc[row].items()}
    facts = {"patient": cells["patient_id"], "fold": cells["fold"]}
    facts |= {name: cells[name] for name in found.task.columns if cells.get(name)}
    said, correct = verdict(found.task, cells)
    picture = _thumbnail(thumbnails, cells["slide_id"])
    return SlideCard(cells["slide_id"], facts | said, () if picture is None else (picture,), correct=correct)


def verdict(task: Task, cells: Mapping[str, str]) -> tuple[dict[str, str], bool | None]:
    """Return what a row of predictions says, for a card, and whether it agrees with the label; None where none can.

    Parameters
    ----------
    task : Task
    cells : mapping of str to str
        A row of ``predictions.csv``.
    """
    facts = {name: _short(cells[name]) for name in task.verdicts if name in cells}
    classes: tuple[str, ...] = getattr(task, "classes", ())
    if not classes:
        return facts, None
    judged = cells["predicted"] if len(classes) > 2 else classes[1]
    facts[f"probability of {judged}"] = _short(cells[f"prob_{judged}"])
    if "threshold" in task.tunable:
        facts["threshold"] = _short(cells["threshold"])
    return facts, cells["predicted"] == cells[task.columns[0]]


def _short(value: str) -> str:
    try:
        number = float(value)
    except ValueError:
        return value
    return value if number.is_integer() else f"{number:.3f}"


def _thumbnail(folder: Path | None, slide: str) -> Picture | None:
    path = None if folder is None else find_file(folder, slide, ".jpg")
    if path is None or not path.is_file():
        return None
    with Image.open(path) as image:
        small = image.convert("RGB")
        small.thumbnail((THUMBNAIL_PX, THUMBNAIL_PX))
        return Picture(np.asarray(small), "")
