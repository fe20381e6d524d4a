"""`eosin run`: slides + labels → everything, in one job folder."""

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
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
    Plane,
    Precision,
    RecipeName,
    Scene,
    SlideMpp,
    Slides,
    Splits,
    StudyName,
    Target,
    TaskKind,
    TissueWeights,
    Weights,
    Workers,
    scene_number,
    slide_mpp_source,
)
from eosin.cli._common import Done, command
from eosin.cli._progress import progress
from eosin.cli._settings import Settings

if TYPE_CHECKING:
    from eosin.features._encoders import Precision as PrecisionName
    from eosin.pipeline._preflight import Problems
    from eosin.pipeline._run import Checked, Inputs
    from eosin.pipeline._two_stage import SecondStage

GROUPS = ("tiling", "tissue", "quality", "encoder", "recipe", "task", "target", "folds", "formats", "maps", "second")
RARE = (
    "task", "splits", "folds", "missing", "ids", "slide_mpp", "scene", "plane", "max_blur", "max_pen", "max_fold",
    "tissue_weights", "weights", "batch_size", "precision", "study_name",
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class Plan:
    """What a run is asked to do, as far as the options can be understood, and what is wrong with them.

    Attributes
    ----------
    inputs : Inputs
        What one stage and two are given alike.
    second : SecondStage, optional
        Of a run in two stages.
    problems : Problems
    """

    inputs: "Inputs"
    second: "SecondStage | None"
    problems: "Problems"

    def check(self) -> "Checked":
        """Find what stands in the way; nothing is written."""
        from eosin.pipeline._run import check_run
        from eosin.pipeline._two_stage import check_two_stage

        if self.second is None:
            return check_run(self.problems, self.inputs)
        return check_two_stage(self.problems, self.inputs, self.second)


def plan(
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
    missing: Missing = "few",
    ids: IdsPolicy = "ask",
    slide_mpp: SlideMpp = None,
    scene: Scene = None,
    plane: Plane = None,
    max_blur: MaxBlur = None,
    max_pen: MaxPen = None,
    max_fold: MaxFold = None,
    tissue_weights: TissueWeights = None,
    weights: Weights = None,
    batch_size: BatchSize = 64,
    precision: Precision = "fp32",
    device: Device = "auto",
    workers: Workers = 0,
    study_name: StudyName = None,
    settings: Settings,
) -> Plan:
    """Understand the options of `eosin run`; those that make no sense are problems, and the others are kept."""
    from eosin.cli._study import ids_policy, missing_policy, recipe_of, require_one_source
    from eosin.pipeline._deploy import Machine
    from eosin.pipeline._preflight import Problems
    from eosin.pipeline._run import Inputs, Pipeline
    from eosin.pipeline._two_stage import FIRST_TILING, SecondStage
    from eosin.wsi._job import JobFolder

    problems = Problems()
    problems.attempt(require_one_source, splits, folds)
    flags = {"encoder": encoder, "task": task, "target": target, "folds": folds}
    groups = {name: settings.choose(name, flag, None) for name, flag in flags.items()}
    groups |= {name: settings.data.get(name) for name in ("tiling", "tissue", "formats", "maps")}
    groups["quality"] = problems.attempt(
        settings.group, "quality", max_blur=max_blur, max_pen=max_pen, max_fold=max_fold
    )
    chosen = problems.attempt(recipe_of, recipe, settings)
    groups["recipe"] = None if chosen is None else chosen.model_dump(mode="json")
    second = None
    named = problems.attempt(settings.named, "recipe") if chosen is not None else None
    if "two_stage" in (recipe, (named or (None,))[0]) or "second" in settings.data:
        second = problems.attempt(settings.parse, "second", SecondStage) or SecondStage()
        groups["tiling"] = {"mpp": FIRST_TILING.mpp, **(groups["tiling"] or {})}
    pipeline = Pipeline()
    for name, value in groups.items():
        one = None if value is None else problems.attempt(Pipeline.parse, {name: value}, source="run")
        pipeline = pipeline if one is None else pipeline.model_copy(update={name: getattr(one, name)})
    machine = Machine(
        workers=workers,
        device=device,
        batch_size=batch_size,
        precision=cast("PrecisionName", precision),
        weights=weights,
    )
    number = problems.attempt(scene_number, scene)
    inputs = Inputs(
        slides,
        labels,
        JobFolder(job),
        pipeline,
        machine,
        slide_mpp=slide_mpp_source(slide_mpp),
        scene=number,
        plane=plane,
        splits=splits,
        missing=problems.attempt(missing_policy, missing) or "few",
        ids=problems.attempt(ids_policy, ids) or "ask",
        study=study_name,
        tissue_weights=tissue_weights,
    )
    return Plan(inputs, second, problems)


def planned(function: Callable[[Plan], Done]) -> Callable[..., Done]:
    """Give a function of a plan the options of `plan`, so that `run` and `check` take the same."""

    @functools.wraps(function)
    def on_plan(**options: Any) -> Done:
        return function(plan(**options))

    on_plan.__signature__ = inspect.signature(plan)  # type: ignore[attr-defined]
    return on_plan


@command(*GROUPS, rare=RARE, checks_device=False, cluster="job")
@planned
def run(asked: Plan) -> Done:
    """Run every step from slides to report: tiles, features, splits, cross-validation, final model, heat maps.

    With the recipe two_stage, or options of the group `second`, the steps run at two resolutions: the attention of a
    first model at 2 µm/px (tiling.mpp) chooses the tiles of a second model at 1 µm/px (second.tiling.mpp,
    second.selection.budget).

    A run with other options in the same job is a study of its own, in JOB/studies. Nothing is overwritten.
    """
    from eosin.mil._train import settled_precision
    from eosin.pipeline._run import run_inputs
    from eosin.pipeline._two_stage import STAGES, run_both
    from eosin.report._measures import headline

    paths: list[Path] = []
    if asked.second is not None:
        staged = run_both(asked.inputs, asked.second, problems=asked.problems, progress=progress)
        result, report = staged.second, staged.report
        paths = [staged.first.out / "report.html", result.out / STAGES]
    else:
        result = run_inputs(asked.inputs, problems=asked.problems, progress=progress)
        report = result.report
    paths += [result.crossval / "metrics.json", result.model, result.heatmaps, result.out / "report.html"]
    computed = f"models were trained in {settled_precision('auto', asked.inputs.machine.device, result.out)}"
    ending = (*result.flow.lines(), headline(result.metrics), computed, f"open {paths[-1]} in a browser")
    return Done(paths, report, lines=ending)
