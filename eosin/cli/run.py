"""`eosin run`: slides + labels → everything, in one job folder."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from eosin.cli._arguments import (
    BatchSize,
    Device,
    IdsPolicy,
    Job,
    Labels,
    MaxBlur,
    MaxFold,
    MaxPen,
    Missing,
    Precision,
    RecipeName,
    SlideMpp,
    Slides,
    Splits,
    Target,
    TaskKind,
    Weights,
    Workers,
    slide_mpp_source,
)
from eosin.cli._common import Done, command, progress
from eosin.cli._settings import Settings

if TYPE_CHECKING:
    from eosin.features._encoders import Precision as PrecisionName


@command(
    "tiling", "tissue", "quality", "encoder", "recipe", "task", "target", "folds", "formats", "second",
    rare=("task", "splits", "folds", "missing", "ids", "slide_mpp", "max_blur", "max_pen", "max_fold", "weights",
          "batch_size", "precision"),
)  # fmt: skip
def run(
    *,
    slides: Slides,
    labels: Labels,
    encoder: Annotated[
        str | None, typer.Option(help="Tile encoder; `eosin encoders` lists the names.", show_default="he_texture")
    ] = None,
    recipe: RecipeName = None,
    job: Job,
    task: TaskKind = None,
    target: Target = None,
    splits: Splits = None,
    folds: Annotated[
        int | None, typer.Option(help="Number of folds, if there is no --splits.", show_default="5")
    ] = None,
    missing: Missing = "error",
    ids: IdsPolicy = "ask",
    slide_mpp: SlideMpp = None,
    max_blur: MaxBlur = None,
    max_pen: MaxPen = None,
    max_fold: MaxFold = None,
    weights: Weights = None,
    batch_size: BatchSize = 64,
    precision: Precision = "fp32",
    device: Device = "auto",
    workers: Workers = 0,
    settings: Settings,
) -> Done:
    """Run every step from slides to report: tiles, features, splits, cross-validation, final model, heat maps.

    With the recipe two_stage, or options of the group `second`, the steps run at two resolutions: the attention of a
    first model at 2 µm/px (tiling.mpp) chooses the tiles of a second model at 1 µm/px (second.tiling.mpp,
    second.selection.budget).
    """
    from eosin.cli._study import ids_policy, missing_policy, recipe_of, require_one_source
    from eosin.pipeline._deploy import Machine
    from eosin.pipeline._run import Pipeline, run_pipeline
    from eosin.pipeline._two_stage import FIRST_TILING, STAGES, SecondStage, run_two_stage
    from eosin.wsi._job import JobFolder

    require_one_source(splits, folds)
    flags = {"encoder": encoder, "task": task, "target": target, "folds": folds}
    given = {key: settings.choose(key, flag, None) for key, flag in flags.items()}
    options = {key: value for key, value in given.items() if value is not None}
    groups = {name: settings.data[name] for name in ("tiling", "tissue", "formats") if name in settings.data}
    chosen = recipe_of(recipe, settings).model_dump(mode="json")
    groups["quality"] = settings.group("quality", max_blur=max_blur, max_pen=max_pen, max_fold=max_fold)
    two_stage = "two_stage" in (recipe, settings.named("recipe")[0]) or "second" in settings.data
    if two_stage:
        groups["tiling"] = {"mpp": FIRST_TILING.mpp, **settings.group("tiling")}
    pipeline = Pipeline.parse({**groups, **options, "recipe": chosen}, source="run")
    machine = Machine(
        workers=workers,
        device=device,
        batch_size=batch_size,
        precision=cast("PrecisionName", precision),
        weights=weights,
    )
    common: dict[str, Any] = {
        "machine": machine,
        "slide_mpp": slide_mpp_source(slide_mpp),
        "splits": splits,
        "missing": missing_policy(missing),
        "ids": ids_policy(ids),
        "progress": progress,
    }
    paths: list[Path] = []
    if two_stage:
        second = settings.parse("second", SecondStage)
        staged = run_two_stage(slides, labels, JobFolder(job), pipeline, second, **common)
        result, report = staged.second, staged.report
        paths = [staged.first.job.root / "report.html", job / STAGES]
    else:
        result = run_pipeline(slides, labels, JobFolder(job), pipeline, **common)
        report = result.report
    paths += [result.crossval / "metrics.json", result.model, result.heatmaps, job / "report.html"]
    return Done(paths, report, lines=tuple(result.flow.lines()))
