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
from eosin.errors import ConfigError

if TYPE_CHECKING:
    from pandas import DataFrame

    from eosin.heatmaps.report import ReportData, RocInput
    from eosin.mil.recipe import Recipe
    from eosin.mil.splits import Split
    from eosin.mil.study import Study
    from eosin.mil.tasks import Task

CHOSEN, SWEEP_TABLE = "chosen", "sweep.csv"


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
    sweep: Annotated[
        Path | None, typer.Option(help="YAML file of recipes, a grid of options and seeds to choose from.")
    ] = None,
    device: Device = "auto",
    precision: TrainPrecision = "fp32",
    settings: Settings,
) -> Done:
    """Train and test every fold; selection happens on a validation part, never on the test part."""
    from eosin.cli._study import choose_recipe, read_study
    from eosin.heatmaps.report import write_report
    from eosin.mil.crossval import METRICS, PREDICTIONS

    chosen = choose_recipe(recipe, settings)
    candidates = _candidates(sweep, recipe, settings)
    study = read_study(features, labels, settings, task=task, target=target, group=group, level=level, missing=missing)
    parts = study.splits(splits, folds=settings.choose("folds", folds, 5), seed=chosen.training.seed)
    results = out
    if sweep is None:
        metrics = _train(chosen, study, parts, out, device=device, precision=precision)
    else:
        metrics = _sweep(candidates, study, parts, out, device=device, precision=precision)
        results = out / CHOSEN
    write_report(out / "report.html", _report(study.task, metrics, results / PREDICTIONS))
    tables = [] if sweep is None else [out / SWEEP_TABLE]
    return Done([*tables, results / METRICS, results / PREDICTIONS, out / "report.html"])


def _candidates(sweep: Path | None, recipe: str | None, settings: Settings) -> "dict[str, Recipe]":
    from eosin.mil.sweep import Sweep
    from eosin.options import read_yaml

    if sweep is None:
        return {}
    if recipe is not None or settings.group("recipe"):
        raise ConfigError("--sweep names its recipes itself; leave out --recipe and the group recipe")
    return Sweep.parse(read_yaml(sweep), source=str(sweep)).candidates()


def _train(
    recipe: "Recipe", study: "Study", parts: "list[Split]", out: Path, *, device: str, precision: str
) -> Mapping[str, Any]:
    from eosin.mil.crossval import crossval as train_and_test

    with progress("cross-validate", len(parts)) as advance:
        return train_and_test(
            recipe,
            study.task,
            study.examples,
            parts,
            study.cohort,
            out,
            device=device,
            precision=precision,
            progress=advance,
        )


def _sweep(
    candidates: "dict[str, Recipe]",
    study: "Study",
    parts: "list[Split]",
    out: Path,
    *,
    device: str,
    precision: str,
) -> Mapping[str, Any]:
    from eosin.mil.sweep import run_sweep

    with progress("sweep", len(candidates) * len(parts)) as advance:
        return run_sweep(
            candidates,
            study.task,
            study.examples,
            parts,
            study.cohort,
            out,
            device=device,
            precision=precision,
            progress=None if advance is None else lambda _name, fold: advance(fold),
        )


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
