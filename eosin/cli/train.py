"""`eosin train`: features + labels → one model."""

from typing import Annotated

import typer

from eosin.cli._arguments import (
    Device,
    FeaturesFolder,
    Group,
    Labels,
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
    missing: Missing = "error",
    device: Device = "auto",
    precision: TrainPrecision = "fp32",
    settings: Settings,
) -> Done:
    """Train one model; a run that was killed continues where it was."""
    from eosin.cli._study import Labelled, Study, choose_recipe
    from eosin.mil.train import fit

    chosen = choose_recipe(recipe, settings)
    labelled = Labelled.read(
        labels,
        task=settings.choose("task", task, "classification"),
        target=settings.choose("target", target, None),
        group=group,
    )
    study = Study.read(features, labelled, missing=missing)
    split = study.training_split(splits, fold, chosen)
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
