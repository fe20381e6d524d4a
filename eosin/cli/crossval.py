"""`eosin crossval`: features + labels → a model per fold, out-of-fold predictions, metrics, report."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from eosin.cli._arguments import (
    Device,
    FeaturesFolder,
    Group,
    Labels,
    Level,
    Missing,
    RecipeName,
    Splits,
    Target,
    TaskKind,
    TrainPrecision,
)
from eosin.cli._common import Done, Settings, command, progress

if TYPE_CHECKING:
    from pandas import DataFrame

    from eosin.heatmaps.report import ReportData, RocInput
    from eosin.mil.tasks import Task


@command("recipe", "task", "target", "folds")
def crossval(
    *,
    features: FeaturesFolder,
    labels: Labels,
    task: TaskKind = None,
    recipe: RecipeName = None,
    out: Annotated[Path, typer.Option(help="Folder for models, predictions, metrics and the report.")],
    splits: Splits = None,
    folds: Annotated[
        int | None, typer.Option(help="Number of folds when no splits are given.", show_default="5")
    ] = None,
    target: Target = None,
    group: Group = "patient",
    level: Level = "slide",
    missing: Missing = "error",
    device: Device = "auto",
    precision: TrainPrecision = "fp32",
    settings: Settings,
) -> Done:
    """Train and test every fold; selection happens on a validation part, never on the test part."""
    from eosin.cli._study import choose_recipe, read_study
    from eosin.heatmaps.report import write_report
    from eosin.mil.crossval import METRICS, PREDICTIONS
    from eosin.mil.crossval import crossval as train_and_test

    chosen = choose_recipe(recipe, settings)
    study = read_study(features, labels, settings, task=task, target=target, group=group, level=level, missing=missing)
    parts = study.splits(splits, folds=settings.choose("folds", folds, 5), seed=chosen.training.seed)
    with progress("cross-validate", len(parts)) as advance:
        metrics = train_and_test(
            chosen,
            study.task,
            study.examples,
            parts,
            study.cohort,
            out,
            device=device,
            precision=precision,
            progress=advance,
        )
    write_report(out / "report.html", _report(study.task, metrics, out / PREDICTIONS))
    return Done([out / METRICS, out / PREDICTIONS, out / "report.html"])


def _report(task: "Task", metrics: Mapping[str, Any], path: Path) -> "ReportData":
    import pandas as pd

    from eosin import __version__
    from eosin.heatmaps.report import Metric, ReportData
    from eosin.pipeline import METRIC_NAMES, read_predictions

    predictions = read_predictions(path)
    slides, patients = predictions["slide_id"].nunique(), predictions["patient_id"].nunique()
    note = f"all {len(predictions)} test predictions together; 95 % bootstrap over {patients} patients"
    over_folds = pd.DataFrame(metrics["metrics"]).T.rename_axis("metric").reset_index()
    return ReportData(
        title="Cross-validation",
        summary=f"{slides} slides of {patients} patients in {metrics['n_folds']} folds, each tested by a model that "
        "was trained on other patients.",
        metrics=tuple(
            Metric(METRIC_NAMES.get(name, name), estimate["value"], estimate["lower"], estimate["upper"], note)
            for name, estimate in metrics["out_of_fold"].items()
            if estimate["value"] is not None
        ),
        roc=_roc(task, predictions),
        predictions=predictions,
        tables={"Over folds": over_folds, "Folds": pd.DataFrame(metrics["folds"])},
        provenance={"eosin": __version__, "recipe": json.dumps(metrics["recipe"], sort_keys=True)},
    )


def _roc(task: "Task", predictions: "DataFrame") -> "tuple[RocInput, ...]":
    """Return the curve of a two-class task; the second class is the positive one."""
    from eosin.heatmaps.report import RocInput

    classes: tuple[str, ...] = getattr(task, "classes", ())
    if len(classes) != 2:
        return ()
    truth = (predictions[task.columns[0]] == classes[1]).to_numpy()
    return (RocInput("test parts", truth, predictions[f"prob_{classes[1]}"].to_numpy(dtype=float)),)
