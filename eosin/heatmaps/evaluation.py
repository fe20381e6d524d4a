"""The report of a cross-validation: what its predictions are worth, where they fail, and where they come from."""

import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from PIL import Image

from eosin import __version__
from eosin.heatmaps.figures import (
    Curve,
    Panel,
    calibration_panel,
    precision_recall_panel,
    roc_panel,
    scatter_panel,
    survival_panel,
)
from eosin.heatmaps.report import Confusion, Metric, Picture, ReportData, SlideCard, write_report
from eosin.mil.compare import compare_predictions
from eosin.mil.evaluate import bootstrap
from eosin.mil.metrics import Floats, confusion
from eosin.mil.multitask import MultiTask
from eosin.mil.study import Study
from eosin.mil.tables import read_table
from eosin.mil.task import Task
from eosin.mil.tasks import load_task

METRIC_NAMES = {
    "auc": "Area under the ROC curve",
    "accuracy": "Accuracy",
    "balanced_accuracy": "Balanced accuracy",
    "average_precision": "Average precision",
    "f1": "F1 score, mean of the classes",
    "log_loss": "Cross-entropy",
    "brier": "Brier score",
    "ece": "Expected calibration error",
    "kappa": "Cohen's kappa",
    "quadratic_kappa": "Quadratic kappa",
    "mean_absolute_error": "Mean absolute error",
    "rmse": "Root mean squared error",
    "r2": "Explained variance R²",
    "pearson": "Pearson correlation",
    "spearman": "Spearman correlation",
    "cindex": "Concordance index",
    "time_auc": "Time-dependent AUC",
    "integrated_brier": "Integrated Brier score",
    "score": "Mean over the targets",
}
LOWER_IS_BETTER = ("log_loss", "brier", "ece", "mean_absolute_error", "rmse", "integrated_brier")
SITE_METRICS = ("auc", "balanced_accuracy", "quadratic_kappa", "cindex", "spearman", "r2", "accuracy", "f1", "score")
WORST = 12
THUMBNAIL_PX = 300
SITE_RESAMPLES = 300
SHOWN_PREDICTIONS = 300
FOLD_METRICS = 7


@dataclass(frozen=True, eq=False)
class Evaluated:
    """Test predictions as numbers again.

    Attributes
    ----------
    task : Task
    frame : DataFrame
        ``predictions.csv``, every value as text.
    outputs : (n, outputs) float
    targets : (n, ...) array
    """

    task: Task
    frame: pd.DataFrame
    outputs: Floats
    targets: NDArray[Any]

    @classmethod
    def of(cls, task: Task, frame: pd.DataFrame) -> "Evaluated":
        """Read the outputs and targets that a table of predictions holds."""
        rows = [{str(name): str(value) for name, value in row.items()} for row in frame.to_dict("records")]
        columns = {str(name): [row[str(name)] for row in rows] for name in frame}
        return cls(task, frame, task.read_outputs(columns), task.encode(rows).numpy())

    @property
    def patients(self) -> list[str]:
        """Patient of each row."""
        return [str(name) for name in self.frame["patient_id"]]

    def parts(self) -> list[tuple[str, "Evaluated"]]:
        """Return each target of a task of several with its name and the rows that know it; else itself, unnamed."""
        if not isinstance(self.task, MultiTask):
            return [("", self)]
        return [
            (name, Evaluated(part, self.frame.iloc[there], outputs, targets))
            for name, part, outputs, targets, there in self.task.by_part(self.outputs, self.targets)
        ]


@dataclass(frozen=True, eq=False)
class Context:
    """What a report tells beside the figures.

    Attributes
    ----------
    title : str
    sites : mapping of str to str
        Site of each slide; may be empty.
    thumbnails : Path, optional
        Folder of ``<slide>.jpg``.
    notes : sequence of str
        Limits, and how the labels were understood.
    tables : mapping of str to DataFrame
        Further tables, for example a comparison.
    provenance : mapping of str to str
    """

    title: str = "Cross-validation"
    sites: Mapping[str, str] = field(default_factory=dict)
    thumbnails: Path | None = None
    notes: Sequence[str] = ()
    tables: Mapping[str, pd.DataFrame] = field(default_factory=dict)
    provenance: Mapping[str, str] = field(default_factory=dict)


def report_crossval(
    out: Path, metrics: Mapping[str, Any], predictions: Path, study: Study, context: Context | None = None
) -> None:
    """Write the report of a cross-validation.

    Parameters
    ----------
    out : Path
        Of the HTML file.
    metrics : mapping
        As `eosin.mil.crossval.crossval` returns.
    predictions : Path
        Its ``predictions.csv``.
    study : Study
        Its notes, sites and features are told.
    context : Context, optional
        What else is told.

    Raises
    ------
    OutputError
        If the file cannot be written.
    """
    given = context or Context()
    frame = pd.read_csv(predictions, dtype=str, keep_default_na=False)
    column = study.table.site_column()
    sites = {} if column is None else dict(zip(study.table.slide_ids, study.table.values[column], strict=True))
    spec = study.examples.bags.spec
    facts = {
        "eosin": f"{__version__}, Python {platform.python_version()}, torch {torch.__version__}",
        "features": f"{spec.encoder} {spec.weights_hash}".strip() + (f", {spec.mpp:g} µm/px" if spec.mpp else ""),
        "tiles": "" if spec.patch_size is None else f"{spec.patch_size} px",
        "task": json.dumps(metrics["task"], sort_keys=True),
        "recipe": json.dumps(metrics["recipe"], sort_keys=True),
    }
    full = replace(
        given,
        sites=dict(given.sites) or sites,
        notes=(*given.notes, *(f"{note[0].upper()}{note[1:]}." for note in study.notes)),
        provenance={name: text for name, text in facts.items() if text} | dict(given.provenance),
    )
    write_report(out, evaluation_report(metrics, frame, load_task(metrics["task"]), full))


def compare_runs(task: Mapping[str, Any], first: Path, second: Path) -> dict[str, pd.DataFrame]:
    """Return the table that compares two cross-validations on the slides that both tested.

    Parameters
    ----------
    task : mapping
        Of the first, as ``metrics.json`` has it.
    first, second : Path
        Their ``predictions.csv``.

    Raises
    ------
    LabelError
        If the second is missing, of another task, or of other slides or labels.
    """
    differences = compare_predictions(load_task(task), read_table(first), read_table(second))
    rows = [
        {
            "Measure": _name(name),
            "This": _number(found.first),
            "Other": _number(found.second),
            "Difference": _number(found.difference),
            "95 % interval": "undefined" if found.lower is None else (found.lower, found.upper),
            "p": "undefined" if found.p_value is None else f"{found.p_value:.3g}",
            "Test": found.test,
        }
        for name, found in differences.items()
    ]
    return {f"Compared with {second.parent}": pd.DataFrame(rows)}


def evaluation_report(metrics: Mapping[str, Any], frame: pd.DataFrame, task: Task, context: Context) -> ReportData:
    """Put a cross-validation together for a person.

    Parameters
    ----------
    metrics : mapping
        As `eosin.mil.crossval.crossval` returns.
    frame : DataFrame
        Its ``predictions.csv``, every value as text.
    task : Task
    context : Context

    Returns
    -------
    ReportData
        For `eosin.heatmaps.report.write_report`.
    """
    found = Evaluated.of(task, frame)
    patients = len(set(found.patients))
    tables = {"Over folds": over_folds(metrics["metrics"]), "Folds": _folds(metrics["folds"])}
    sites = site_table(found, context.sites)
    if sites is not None:
        tables["Sites"] = sites
    return ReportData(
        title=context.title,
        summary=_summary(metrics, task, found, patients),
        metrics=metric_rows(metrics["out_of_fold"]),
        metrics_note=(
            f"All {len(frame)} test predictions together, with the 95 % interval of a bootstrap over {patients} "
            "patients; ↓: lower is better. A measure that the data do not define is undefined."
        ),
        panels=panels(found),
        confusions=confusions(found),
        slides=worst_cards(found, context.thumbnails),
        slides_heading="Worst predictions",
        predictions=frame.head(SHOWN_PREDICTIONS),
        tables=tables | dict(context.tables),
        notes=(*context.notes, *_shortened(frame)),
        provenance=context.provenance,
    )


def _shortened(frame: pd.DataFrame) -> list[str]:
    if len(frame) <= SHOWN_PREDICTIONS:
        return []
    return [f"The first {SHOWN_PREDICTIONS} of {len(frame)} predictions are shown; predictions.csv holds all."]


def _summary(metrics: Mapping[str, Any], task: Task, found: Evaluated, patients: int) -> str:
    slides = found.frame["slide_id"].nunique()
    best = metrics["out_of_fold"].get(task.selection_metric, {})
    text = (
        f"{slides} slides of {patients} patients in {metrics['n_folds']} folds, each tested by a model that was "
        "trained on other patients and chosen without them."
    )
    if best.get("value") is None:
        return text
    interval = "" if best["lower"] is None else f" ({best['lower']:.3f} to {best['upper']:.3f})"
    return f"{text} {_name(task.selection_metric)}: {best['value']:.3f}{interval}."


def metric_rows(estimates: Mapping[str, Mapping[str, Any]]) -> tuple[Metric, ...]:
    """Return every metric by its name in words, the undefined ones too."""
    return tuple(
        Metric(_name(name), estimate["value"], estimate["lower"], estimate["upper"])
        for name, estimate in estimates.items()
    )


def _name(metric: str) -> str:
    base = next((key for key in sorted(METRIC_NAMES, key=len, reverse=True) if _is(metric, key)), None)
    if base is None:
        return metric
    rest = metric.removeprefix(base).removeprefix("_") if metric.startswith(base) else metric.removesuffix(f"_{base}")
    named = METRIC_NAMES[base] + (f", {rest}" if rest else "")
    return f"{named} ↓" if base in LOWER_IS_BETTER else named


def _is(metric: str, key: str) -> bool:
    return metric == key or metric.startswith(f"{key}_") or metric.endswith(f"_{key}")


def over_folds(figures: Mapping[str, Mapping[str, Any]]) -> pd.DataFrame:
    """Return mean, spread and interval over folds, a row per metric."""
    rows = [
        {
            "Measure": _name(name),
            "Mean": _number(found["mean"]),
            "Standard deviation": _number(found["standard_deviation"]),
            "Standard error": _number(found["standard_error"]),
            "95 % interval of the mean": tuple(found["interval"]) if found["interval"] else "undefined",
            "Folds": found["n_folds"],
        }
        for name, found in figures.items()
    ]
    return pd.DataFrame(rows)


def _number(value: float | None) -> float | str:
    return "undefined" if value is None else value


def _folds(folds: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    names = [name for name in folds[0] if name not in ("fold", "n_test")][:FOLD_METRICS]
    rows = [
        {"Fold": str(fold["fold"]), "Test slides": str(fold["n_test"])}
        | {_name(name): _number(fold.get(name)) for name in names}
        for fold in folds
    ]
    return pd.DataFrame(rows)


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
            *(calibration_panel(curve, error=None, title=f"{name}Calibration, {curve.name}") for curve in curves[:4]),
        ]
    if part.task.kind == "regression":
        return [scatter_panel(part.targets.astype(float), part.outputs[:, 0], title=f"{name}Predicted and true")]
    risk = part.frame[_column(part.frame, part.task, "risk")].astype(float)
    high = risk > risk.groupby(part.frame["fold"]).transform("median")
    title = f"{name}Survival by predicted risk"
    return [survival_panel(high.to_numpy(), part.targets[:, 0], part.targets[:, 1] == 1, title=title)]


def _column(frame: pd.DataFrame, task: Task, name: str) -> str:
    return name if name in frame else f"{task.columns[0]}_{name}"


def _class_panels(part: Evaluated, classes: Sequence[str], name: str) -> list[Panel | None]:
    shown = [1] if len(classes) == 2 else range(len(classes))
    curves = [Curve(classes[k], part.targets == k, part.outputs[:, k]) for k in shown]
    error = part.task.metrics(part.outputs, part.targets)["ece"]
    if len(classes) == 2:
        calibrated = Curve(f"Probability of {classes[1]}", curves[0].truth, curves[0].score)
    else:
        top = part.outputs.argmax(1)
        calibrated = Curve("Probability of the most probable class", top == part.targets, part.outputs.max(1))
    return [
        roc_panel(curves, title=f"{name}ROC"),
        precision_recall_panel(curves, title=f"{name}Precision and recall"),
        calibration_panel(calibrated, error=error, title=f"{name}Calibration"),
    ]


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


def site_table(found: Evaluated, sites: Mapping[str, str]) -> pd.DataFrame | None:
    """Return the main metrics of the slides of each site, with intervals over its patients; None without sites."""
    where = np.array([sites.get(str(slide), "") for slide in found.frame["slide_id"]])
    if not (where != "").any():
        return None
    rows = []
    for site in sorted(set(where.tolist()) - {""}):
        rows.append(_site_row(found, site, np.flatnonzero(where == site)))
    return pd.DataFrame(sorted(rows, key=lambda row: -int(row["Slides"])))


def _site_row(found: Evaluated, site: str, rows: NDArray[np.int64]) -> dict[str, Any]:
    patients = [found.patients[row] for row in rows]
    estimates = bootstrap(
        found.task, found.outputs[rows], found.targets[rows], patients, resamples=SITE_RESAMPLES, seed=0
    )
    row: dict[str, Any] = {"Site": site, "Slides": str(len(rows)), "Patients": str(len(set(patients)))}
    for name in [name for name in SITE_METRICS if name in estimates][:3]:
        estimate = estimates[name]
        row[_name(name)] = _number(estimate.value)
        unknown = estimate.lower is None or estimate.upper is None
        row[f"95 % interval{' ' * len(row)}"] = "undefined" if unknown else (estimate.lower, estimate.upper)
    return row


def worst_cards(found: Evaluated, thumbnails: Path | None) -> tuple[SlideCard, ...]:
    """Return the slides whose predictions are farthest from the truth, with their thumbnails where there are any."""
    surprise = found.task.surprise(found.outputs, found.targets)
    known = np.flatnonzero(np.isfinite(surprise))
    order = known[np.argsort(-surprise[known], kind="stable")][:WORST]
    return tuple(_worst_card(found, int(row), thumbnails) for row in order)


def _worst_card(found: Evaluated, row: int, thumbnails: Path | None) -> SlideCard:
    cells = {str(name): str(value) for name, value in found.frame.iloc[row].items()}
    facts = {"patient": cells["patient_id"], "fold": cells["fold"]}
    facts |= {name: cells[name] for name in found.task.columns if cells.get(name)}
    facts |= {name: _short(value) for name, value in cells.items() if _is_verdict(name)}
    predicted = cells.get("predicted")
    if f"prob_{predicted}" in cells:
        facts["probability"] = _short(cells[f"prob_{predicted}"])
    correct = None
    if getattr(found.task, "classes", ()) and predicted is not None:
        correct = predicted == cells[found.task.columns[0]]
    picture = _thumbnail(thumbnails, cells["slide_id"])
    return SlideCard(cells["slide_id"], facts, () if picture is None else (picture,), correct=correct)


def _is_verdict(name: str) -> bool:
    return name.split("_")[0] == "predicted" or name.endswith(("_predicted", "risk"))


def _short(value: str) -> str:
    try:
        number = float(value)
    except ValueError:
        return value
    return value if number.is_integer() else f"{number:.3f}"


def _thumbnail(folder: Path | None, slide: str) -> Picture | None:
    path = None if folder is None else folder / f"{slide}.jpg"
    if path is None or not path.is_file():
        return None
    with Image.open(path) as image:
        small = image.convert("RGB")
        small.thumbnail((THUMBNAIL_PX, THUMBNAIL_PX))
        return Picture(np.asarray(small), "Slide")
