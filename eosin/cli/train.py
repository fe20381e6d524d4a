"""`eosin train`: features + labels → one model."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from eosin.cli._arguments import (
    Device,
    FeaturesFolder,
    Group,
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
from eosin.cli._common import Done, Settings, command, merge, progress, say
from eosin.cli._study import CacheGb, DeviceCacheGb, MaxInstancesPerStep, SlideTable

if TYPE_CHECKING:
    from eosin.mil.continual import Source
    from eosin.mil.recipe import Recipe
    from eosin.mil.splits import Split
    from eosin.mil.study import Study


@command("recipe", "task", "target")
def train(
    *,
    features: FeaturesFolder,
    labels: Labels,
    slide_table: SlideTable = None,
    task: TaskKind = None,
    recipe: RecipeName = None,
    out: Run,
    splits: Splits = None,
    fold: Annotated[int | None, typer.Option(help="Which of the splits; without --splits all slides train.")] = None,
    target: Target = None,
    group: Group = "patient",
    level: Level = "slide",
    missing: Missing = "error",
    continue_from: Annotated[
        Path | None,
        typer.Option(metavar="RUN", help="Learn these classes after those of this model; reports what is forgotten."),
    ] = None,
    max_instances_per_step: MaxInstancesPerStep = None,
    cache_gb: CacheGb = 2.0,
    device_cache_gb: DeviceCacheGb = 0.0,
    device: Device = "auto",
    precision: TrainPrecision = "fp32",
    settings: Settings,
) -> Done:
    """Train one model; a run that was killed continues where it was."""
    from eosin.cli._study import BYTES_PER_GB, begin, owner, read_study, training_split
    from eosin.mil.continual import Source, continued
    from eosin.mil.train import fit

    chosen = _recipe(recipe, continue_from, settings, max_instances_per_step)
    study = read_study(
        features,
        labels,
        settings,
        task=task,
        target=target,
        group=group,
        level=level,
        missing=missing,
        slide_table=slide_table,
        cache_gb=cache_gb,
    )
    if continue_from is not None:
        chosen, study = continued(continue_from, study, chosen)
    split = training_split(study, splits, fold, chosen)
    begin(study, out, device=device, precision=precision)
    with progress("train", chosen.training.epochs) as advance:
        fit(
            chosen,
            study.task,
            study.examples.subset(split.train),
            study.examples.subset(split.val) if split.val else None,
            folder=out,
            device=device,
            precision=precision,
            device_cache_bytes=int(device_cache_gb * BYTES_PER_GB),
            progress=advance,
        )
    source = Source.of(features, labels, study, group=owner(group), level=level, slide_table=slide_table)
    return Done([out, *_judge(out, study, source, split, continue_from, device)])


def _recipe(
    name: str | None, continue_from: Path | None, settings: Settings, max_instances_per_step: int | None
) -> "Recipe":
    """Return the recipe that was asked for; of a later task, that of the model before it unless one was."""
    from eosin.cli._study import choose_recipe
    from eosin.mil.continual import base_recipe
    from eosin.mil.recipe import Recipe

    if continue_from is None or name is not None:
        return choose_recipe(name, settings, max_instances_per_step=max_instances_per_step)
    base = base_recipe(continue_from).model_dump(mode="json")
    return Recipe.parse(merge(base, settings.group("recipe")), source="recipe")


def _judge(
    out: Path, study: "Study", source: "Source", split: "Split", continue_from: Path | None, device: str
) -> list[Path]:
    """Note the task in the run, and say how a sequence of tasks stands."""
    from eosin.mil.continual import TABLE, record_task, summary

    sequence = record_task(out, study, source, test=split.test, val=split.val, run=continue_from, device=device)
    if sequence is None or continue_from is None:
        return []
    for line in summary(sequence):
        say(line)
    return [out / TABLE]
