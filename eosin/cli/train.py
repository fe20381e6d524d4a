"""`eosin train`: features + labels → one model."""

from typing import Annotated

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
from eosin.cli._common import Done, Settings, command, progress


@command("recipe", "task", "target")
def train(
    *,
    features: FeaturesFolder,
    labels: Labels,
    task: TaskKind = None,
    recipe: RecipeName = None,
    out: Run,
    splits: Splits = None,
    fold: Annotated[int | None, typer.Option(help="Which of the splits; without --splits all slides train.")] = None,
    target: Target = None,
    group: Group = "patient",
    level: Level = "slide",
    missing: Missing = "error",
    device: Device = "auto",
    precision: TrainPrecision = "fp32",
    settings: Settings,
) -> Done:
    """Train one model; a run that was killed continues where it was."""
    from eosin.cli._study import choose_recipe, read_study, training_split
    from eosin.mil.train import fit

    chosen = choose_recipe(recipe, settings)
    study = read_study(features, labels, settings, task=task, target=target, group=group, level=level, missing=missing)
    split = training_split(study, splits, fold, chosen)
    with progress("train", chosen.training.epochs) as advance:
        fit(
            chosen,
            study.task,
            study.examples.subset(split.train),
            study.examples.subset(split.val) if split.val else None,
            folder=out,
            device=device,
            precision=precision,
            progress=advance,
        )
    return Done([out])
