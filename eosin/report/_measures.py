"""What predictions are worth, as tables for people: over folds, sites and candidates, and beside another run."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from eosin.errors import LabelError
from eosin.mil._compare import compare_predictions
from eosin.mil._crossval import read_predictions
from eosin.mil._evaluate import bootstrap
from eosin.mil._metrics import EVEN, Floats, base_metric
from eosin.mil.task import Task, load_task
from eosin.mil.tasks._classification import Binary, Classification
from eosin.mil.tasks._multilabel import MultiLabel
from eosin.mil.tasks._multitask import MultiTask
from eosin.report._page import Metric

T = TypeVar("T")

METRIC_NAMES = {
    "auc": "Area under the ROC curve",
    "accuracy": "Accuracy",
    "balanced_accuracy": "Balanced accuracy",
    "sensitivity": "Sensitivity",
    "specificity": "Specificity",
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
    "cindex_ipcw": "Concordance index weighted for censoring",
    "time_auc": "Time-dependent AUC",
    "integrated_brier": "Integrated Brier score",
    "score": "Mean over the targets",
}
OVERALL = "score"  # of several targets
LOWER_IS_BETTER = ("log_loss", "brier", "ece", "mean_absolute_error", "rmse", "integrated_brier")
SITE_METRICS = ("auc", "balanced_accuracy", "quadratic_kappa", "cindex", "spearman", "r2", "accuracy", "f1", "score")
SITE_COLUMNS = 3
SITE_RESAMPLES = 300
FOLD_METRICS = 5


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
    decided : (n, ...) int
        What was decided, by the thresholds of each fold.
    """

    task: Task
    frame: pd.DataFrame
    outputs: Floats
    targets: NDArray[Any]
    decided: NDArray[np.int64]

    @classmethod
    def of(cls, task: Task, frame: pd.DataFrame) -> "Evaluated":
        """Read the outputs and targets that a table of predictions holds."""
        rows = [{str(name): str(value) for name, value in row.items()} for row in frame.to_dict("records")]
        columns = {str(name): [row[str(name)] for row in rows] for name in frame}
        targets = task.encode(rows).numpy()
        return cls(task, frame, task.read_outputs(columns), targets, task.read_decided(columns))

    @property
    def patients(self) -> list[str]:
        """Patient of each row."""
        return [str(name) for name in self.frame["patient_id"]]

    @property
    def folds(self) -> NDArray[np.int64]:
        """Number of the fold of each row."""
        return np.unique(self.frame["fold"].to_numpy(str), return_inverse=True)[1]

    def parts(self) -> list[tuple[str, "Evaluated"]]:
        """Return each target of a task of several with its name and the rows that know it; else itself, unnamed."""
        if not isinstance(self.task, MultiTask):
            return [("", self)]
        return [
            (name, Evaluated(part, self.frame.iloc[there], outputs, targets, decided))
            for name, part, outputs, targets, decided, there in self.task.by_part(
                self.outputs, self.targets, self.decided
            )
        ]


def led_by(name: str, figures: Mapping[str, T]) -> dict[str, T]:
    """Return the figures with one metric first."""
    return {key: figures[key] for key in sorted(figures, key=lambda key: key != name)}


def metric_rows(estimates: Mapping[str, Mapping[str, Any]]) -> tuple[Metric, ...]:
    """Return every metric by its name in words, the undefined ones too."""
    return tuple(
        Metric(metric_name(name), estimate["value"], estimate["lower"], estimate["upper"])
        for name, estimate in estimates.items()
    )


def estimate_table(estimates: Mapping[str, Mapping[str, Any]]) -> pd.DataFrame:
    """Return a row per metric with its value and interval."""
    return pd.DataFrame(
        {
            "Measure": metric_name(name),
            "Value": or_undefined(found["value"]),
            "95 % interval": "undefined" if found["lower"] is None else (found["lower"], found["upper"]),
        }
        for name, found in estimates.items()
    )


def metric_name(metric: str) -> str:
    """Return a metric's name in words, with the class or target it is of, and an arrow when lower is better."""
    base = metric if metric == OVERALL else base_metric(metric)
    if base is None:
        return metric
    before, _, after = f"_{metric}_".partition(f"_{base}_")
    named = ", ".join([METRIC_NAMES[base], *filter(None, (before.strip("_"), after.strip("_")))])
    return f"{named} ↓" if base in LOWER_IS_BETTER else named


def headline(metrics: Mapping[str, Any]) -> str:
    """Return the main metric of an evaluation with its interval, and its mean and spread over folds, as one line.

    Parameters
    ----------
    metrics : mapping
        As `eosin.mil._crossval.crossval` returns.
    """
    name = load_task(metrics["task"]).selection_metric
    found, folds = metrics["out_of_fold"].get(name, {}), metrics.get("metrics", {}).get(name, {})
    if found.get("value") is None:
        return f"{metric_name(name)}: undefined, because the test slides do not define it"
    interval = "" if found["lower"] is None else f" (95 % interval {found['lower']:.3f} to {found['upper']:.3f})"
    spread = mean_and_sd(folds)
    over = f"; {spread} over {folds['n_folds']} folds (mean ± sd)" if "±" in spread else ""
    return f"{metric_name(name)}: {found['value']:.3f}{interval}{over}"


def mean_and_sd(found: Mapping[str, Any]) -> str:
    """Return mean ± standard deviation over folds; the mean alone where there is one fold."""
    if found.get("mean") is None:
        return "undefined"
    spread = found.get("standard_deviation")
    return f"{found['mean']:.3f}" + ("" if spread is None else f" ± {spread:.3f}")


def over_folds(figures: Mapping[str, Mapping[str, Any]]) -> pd.DataFrame:
    """Return mean, spread and interval over folds, a row per metric."""
    rows = [
        {
            "Measure": metric_name(name),
            "Mean ± sd": mean_and_sd(found),
            "Standard error": or_undefined(found["standard_error"]),
            "95 % interval of the mean": tuple(found["interval"]) if found["interval"] else "undefined",
            "Folds": found["n_folds"],
        }
        for name, found in figures.items()
    ]
    return pd.DataFrame(rows)


def or_undefined(value: float | None) -> float | str:
    """Return the value, or the word for one that the data do not define."""
    return "undefined" if value is None else value


def fold_table(folds: Sequence[Mapping[str, Any]], first: str) -> pd.DataFrame:
    """Return a row per fold with its main metrics, `first` before the others."""
    measured: dict[str, str] = {name: name for name in folds[0] if name not in ("fold", "n_test")}
    names = list(led_by(first, measured))[:FOLD_METRICS]
    columns: dict[str, list[float | str]] = {
        "Fold": [str(fold["fold"]) for fold in folds],
        "Test slides": [str(fold["n_test"]) for fold in folds],
    }
    columns |= {metric_name(name): [or_undefined(fold.get(name)) for fold in folds] for name in names}
    return pd.DataFrame(columns)


def threshold_table(found: Evaluated) -> dict[str, pd.DataFrame]:
    """Return the thresholds of each fold, a row per class that has one; nothing where all are one half."""
    columns = {label: column for name, part in found.parts() for label, column in _thresholds(name, part.task).items()}
    values = found.frame.groupby("fold", sort=False)[list(columns.values())].first().astype(float)
    if not columns or bool((values == EVEN).all(axis=None)):
        return {}
    rows = [
        {"Predicted": label} | {f"Fold {fold}, from": float(value) for fold, value in values[column].items()}
        for label, column in columns.items()
    ]
    return {"Thresholds, chosen on validation slides": pd.DataFrame(rows)}


def _thresholds(name: str, task: Task) -> dict[str, str]:
    """Return the column of the threshold of each class that has one; `name` is that of a target of several."""
    before = f"{name}_" if name else ""
    if isinstance(task, MultiLabel):
        pairs = zip(task.targets, task.positives, strict=True)
        return {f"{label}: {positive}": f"{before}threshold_{label}" for label, positive in pairs}
    if "threshold" not in task.tunable or not isinstance(task, Binary | Classification):
        return {}
    return {f"{task.target}: {task.classes[1]}": f"{before}threshold"}


def site_table(found: Evaluated, sites: Mapping[str, str]) -> pd.DataFrame | None:
    """Return the main metrics of the slides of each site, with intervals over its patients; None without sites."""
    where = np.array([sites.get(str(slide), "") for slide in found.frame["slide_id"]])
    if not (where != "").any():
        return None
    names = sorted(set(where.tolist()) - {""}, key=lambda name: (-int((where == name).sum()), name))
    return pd.DataFrame([_site_row(found, name, np.flatnonzero(where == name)) for name in names])


def _site_row(found: Evaluated, site: str, rows: NDArray[np.int64]) -> dict[str, Any]:
    patients = [found.patients[row] for row in rows]
    estimates = bootstrap(
        found.task,
        found.outputs[rows],
        found.targets[rows],
        patients,
        decided=found.decided[rows],
        folds=found.folds[rows],
        resamples=SITE_RESAMPLES,
        seed=0,
    )
    row: dict[str, Any] = {"Site": site, "Slides": str(len(rows)), "Patients": str(len(set(patients)))}
    known = [name for name in SITE_METRICS if name in estimates]
    for name in (list(estimates) if known == [OVERALL] else known)[:SITE_COLUMNS]:
        estimate = estimates[name]
        row[metric_name(name)] = or_undefined(estimate.value)
        unknown = estimate.lower is None or estimate.upper is None
        row[f"95 % interval{' ' * len(row)}"] = "undefined" if unknown else (estimate.lower, estimate.upper)
    return row


def sweep_table(path: Path, metrics: Mapping[str, Any]) -> dict[str, pd.DataFrame]:
    """Return the candidates of a sweep, mean ± standard deviation over folds, and in how many folds each was chosen.

    Parameters
    ----------
    path : Path
        ``sweep.csv``.
    metrics : mapping
        Of the choice, as `eosin.mil._sweep.run_sweep` returns.
    """
    table = pd.read_csv(path)
    names = [str(name).removesuffix("_mean") for name in table if str(name).endswith("_mean")][:FOLD_METRICS]
    shown = pd.DataFrame({"Candidate": table["candidate"]})
    chosen = Counter(metrics["choices"])
    shown["Folds that chose it"] = [str(chosen.get(name, "")) for name in table["candidate"]]
    for name in names:
        pairs = zip(table[f"{name}_mean"], table[f"{name}_sd"], strict=True)
        shown[metric_name(name)] = [_mean_and_spread(mean, spread) for mean, spread in pairs]
    return {"Candidates": shown}


def _mean_and_spread(mean: float, spread: float) -> str:
    if np.isnan(mean):
        return "undefined"
    return f"{mean:.3f}" if np.isnan(spread) else f"{mean:.3f} ± {spread:.3f}"


def shots_table(summary: Sequence[Mapping[str, Any]]) -> dict[str, pd.DataFrame]:
    """Return few-shot probes, mean ± standard deviation over draws and folds, a row per number of patients.

    Parameters
    ----------
    summary : sequence of mappings
        As `eosin.mil._probe.summarise_shots` returns.
    """
    names = [name for name in summary[0] if f"{name}_sd" in summary[0]][:FOLD_METRICS]
    rows = []
    for line in summary:
        row: dict[str, str] = {"Patients per class": str(line["k"]), "Probes": str(line["n"])}
        for name in names:
            mean, spread = (np.nan if line[key] is None else float(line[key]) for key in (name, f"{name}_sd"))
            row[metric_name(name)] = _mean_and_spread(mean, spread)
        rows.append(row)
    return {"Few-shot": pd.DataFrame(rows)}


def baseline_table(
    task: Mapping[str, Any], predictions: Path, baseline: Path | None, words: str
) -> dict[str, pd.DataFrame]:
    """Return the table that sets a model beside its baseline; empty where there is none.

    Parameters
    ----------
    task : mapping
        As ``metrics.json`` has it.
    predictions, baseline : Path
        The ``predictions.csv`` of both.
    words : str
        What the baseline is.
    """
    if baseline is None or not baseline.is_file():
        return {}
    try:
        (table,) = compare_runs(task, predictions, baseline).values()
    except LabelError:  # slides that several folds test are not pairs
        table = _side_by_side(load_task(task), predictions, baseline)
    named = {"This": "Model", "Other": "Baseline", "95 % interval": "95 % interval of the difference"}
    return {f"Beside a baseline: {words}": table.rename(columns=named)}


def _side_by_side(task: Task, first: Path, second: Path) -> pd.DataFrame:
    """Return every measure of two tables of predictions, without a test of the difference."""
    found = [Evaluated.of(task, pd.DataFrame(read_predictions(path).columns)) for path in (first, second)]
    this, other = (task.metrics(one.outputs, one.targets, one.decided, folds=one.folds) for one in found)
    return pd.DataFrame(
        {"Measure": metric_name(name), "This": or_undefined(value), "Other": or_undefined(other[name])}
        for name, value in led_by(task.selection_metric, this).items()
    )


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
    ConfigError
        If one of them is not the file that was written.
    """
    differences = compare_predictions(load_task(task), read_predictions(first), read_predictions(second))
    rows = [
        {
            "Measure": metric_name(name),
            "This": or_undefined(found.first),
            "Other": or_undefined(found.second),
            "Difference": or_undefined(found.difference),
            "95 % interval": "undefined" if found.lower is None else (found.lower, found.upper),
            "p": "undefined" if found.p_value is None else f"{found.p_value:.3g}",
            "Test": found.test,
        }
        for name, found in led_by(load_task(task).selection_metric, differences).items()
    ]
    return {f"Compared with {second.parent.name}": pd.DataFrame(rows)}
