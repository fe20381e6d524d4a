"""`eosin train`: features + labels → one model."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from eosin.cli._arguments import (
    Device,
    FeaturesFolder,
    Group,
    IdsPolicy,
    Labels,
    Level,
    Missing,
    RecipeName,
    Run,
    Splits,
    Target,
    TaskKind,
    TrainPrecision,
)
from eosin.cli._common import Done, command
from eosin.cli._progress import progress, say
from eosin.cli._settings import Settings
from eosin.cli._study import CacheGb, DeviceCacheGb, MaxInstancesPerStep, SlideTable

REPORT = "report.html"

if TYPE_CHECKING:
    from eosin.mil._recipe import Recipe
    from eosin.mil._seen import Part
    from eosin.mil._splits import Split
    from eosin.mil._study import Study
    from eosin.mil._training_run import Fitted
    from eosin.mil.continual import Source


@command(
    "recipe", "task", "target",
    rare=("slide_table", "task", "group", "level", "missing", "ids", "continue_from", "max_instances_per_step",
          "cache_gb", "device_cache_gb", "precision"),
    of_job={"out": "model"}, checks_device=False,
)  # fmt: skip
def train(
    *,
    features: FeaturesFolder,
    labels: Labels,
    slide_table: SlideTable = None,
    task: TaskKind = None,
    recipe: RecipeName = None,
    out: Run,
    splits: Splits = None,
    fold: Annotated[
        int | None, typer.Option(help="Number of the split to use (from 0). Without --splits, all slides train.")
    ] = None,
    target: Target = None,
    group: Group = "patient",
    level: Level = "slide",
    missing: Missing = "few",
    ids: IdsPolicy = "ask",
    continue_from: Annotated[
        Path | None,
        typer.Option(
            metavar="RUN", help="Continue this model with the new classes of --labels, and report how much it forgets."
        ),
    ] = None,
    max_instances_per_step: MaxInstancesPerStep = None,
    cache_gb: CacheGb = 2.0,
    device_cache_gb: DeviceCacheGb = 0.0,
    device: Device = "auto",
    precision: TrainPrecision = "auto",
    settings: Settings,
) -> Done:
    """Train one model, and test it on the test slides of the fold. Start a killed run again: it continues."""
    from eosin.cli._study import begin, cache_bytes, read_study, settle
    from eosin.mil._recipe import Recipe
    from eosin.mil._study import fit_study, owner
    from eosin.mil.continual import Source, continued
    from eosin.pipeline._preflight import Problems

    problems = Problems()
    chosen = problems.attempt(_recipe, recipe, continue_from, settings, max_instances_per_step) or Recipe()
    device_bytes = problems.attempt(cache_bytes, device_cache_gb) or 0
    study = read_study(
        features,
        labels,
        settings,
        task=task,
        target=target,
        group=group,
        level=level,
        missing=missing,
        ids=ids,
        problems=problems,
        out=out,
        device=device,
        splits=splits,
        recipes=[chosen] if continue_from is None else [],
        slide_table=slide_table,
        cache_gb=cache_gb,
    )
    if continue_from is not None:
        chosen, study = continued(continue_from, study, chosen)
    split = study.training_split(chosen, splits, fold)
    precision = settle(precision, device, out)
    begin(study, out, [chosen], device=device, precision=precision)
    with progress("train", chosen.training.epochs) as advance:
        fitted = fit_study(
            study,
            chosen,
            out,
            split=split,
            device=device,
            precision=precision,
            device_cache_bytes=device_bytes,
            progress=advance,
        )
    told, ending = (
        ([], [])
        if continue_from is not None
        else _report(fitted, study, split, out, features=features, labels=labels, device=device)
    )
    source = Source.of(features, labels, study, group=owner(group), level=level, slide_table=slide_table)
    account = study.account([split])
    made = [out, *told, *_judge(out, study, source, split, continue_from=continue_from, device=device)]
    return Done([*made, account.write(out)], lines=(*account.lines(), *ending))


def _recipe(
    name: str | None, continue_from: Path | None, settings: Settings, max_instances_per_step: int | None
) -> "Recipe":
    """Return the recipe that was asked for; of a later task, that of the model before it unless one was."""
    from eosin.cli._study import recipe_of
    from eosin.mil._recipe import Recipe
    from eosin.mil.continual import base_recipe
    from eosin.options import merge

    if continue_from is None or name is not None or settings.named("recipe")[0] is not None:
        return recipe_of(name, settings, max_instances_per_step=max_instances_per_step)
    base = base_recipe(continue_from).model_dump(mode="json")
    return Recipe.parse(merge(base, settings.named("recipe")[1]), source="recipe")


def _report(
    fitted: "Fitted", study: "Study", split: "Split", out: Path, *, features: Path, labels: Path, device: str
) -> tuple[list[Path], list[str]]:
    """Test the model on slides that have not trained it, when there are some; return files and closing lines."""
    from eosin._files import file_fingerprint
    from eosin.mil._crossval import METRICS, PREDICTIONS
    from eosin.mil._holdout import judge, unseen_part
    from eosin.report._evaluation import Context, report_crossval
    from eosin.report._measures import headline

    name, ids = unseen_part(split, fitted.card.recipe)
    if os.environ.get("RANK", "0") != "0":
        return [], []
    if not ids:
        return [], ["not tested: the split has no slide that the model was not trained on"]
    part: Part = "validated" if name == "validation" else "no"
    metrics = judge(fitted, study.task, study.examples.subset(ids), out, part=part, device=device)
    chosen_by = "" if name == "test" else ", which chose the epoch and any threshold, so that the figures flatter"
    context = Context(
        title=f"One model on its {name} part",
        summary=f"in the {name} part of the split{chosen_by}; the model was trained on other patients.",
        thumbnails=features.parent.parent / "thumbnails",
        provenance={
            "labels": f"{labels.name} ({file_fingerprint(labels)})",
            "model": f"{out.name} ({fitted.card.model_id})",
        },
    )
    report_crossval(out / REPORT, metrics, out / PREDICTIONS, study, context)
    ending = [f"{name} part: {headline(metrics)}", f"open {out / REPORT} in a browser"]
    return [out / METRICS, out / PREDICTIONS, out / REPORT], ending


def _judge(
    out: Path, study: "Study", source: "Source", split: "Split", *, continue_from: Path | None, device: str
) -> list[Path]:
    """Note the task in the run, and say how a sequence of tasks stands."""
    from eosin.mil.continual import TABLE, record_task, summary

    sequence = record_task(out, study, source, test=split.test, val=split.val, run=continue_from, device=device)
    if sequence is None or continue_from is None:
        return []
    for line in summary(sequence):
        say(line)
    return [out / TABLE]
