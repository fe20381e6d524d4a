"""`eosin zeroshot`: features + sentences → classes of slides, without training."""

from pathlib import Path
from typing import Annotated

import typer

from eosin.cli._arguments import FeaturesFolder, Group, IdsPolicy, Missing, Target, TaskKind
from eosin.cli._common import Done, command
from eosin.cli._progress import progress
from eosin.cli._settings import Settings
from eosin.cli._study import SlideTable

REPORT = "report.html"


@command("task", "target", rare=("slide_table", "task", "group", "missing", "ids", "top_k"), of_job={"out": "zeroshot"})
def zeroshot(
    *,
    features: FeaturesFolder,
    prompts: Annotated[
        Path, typer.Option(metavar="FILE", help="YAML file with a sentence, or a list of sentences, per class.")
    ],
    out: Annotated[Path, typer.Option(help="Folder for the scores and the evaluation.")],
    labels: Annotated[
        Path | None, typer.Option(help="Table of labels; their names are the classes of the prompts. Adds a report.")
    ] = None,
    weights: Annotated[
        Path | None, typer.Option(help="Folder with the model, text side included; no download.")
    ] = None,
    top_k: Annotated[int, typer.Option(help="Tiles of a slide that are averaged for each class.")] = 50,
    allow_remote_code: Annotated[
        bool, typer.Option("--allow-remote-code", help="Run the authors' code with your rights; read it first.")
    ] = False,
    slide_table: SlideTable = None,
    task: TaskKind = None,
    target: Target = None,
    group: Group = "patient",
    missing: Missing = "few",
    ids: IdsPolicy = "ask",
    settings: Settings,
) -> Done:
    """Classify slides by sentences, with the text tower of the encoder that made the features (PLIP, CONCH, KEEP)."""
    from eosin.cli._study import ids_policy, missing_policy
    from eosin.features._store import find_bags
    from eosin.mil._crossval import METRICS, PREDICTIONS
    from eosin.mil._study import open_study, owner
    from eosin.pipeline._zeroshot import SCORES, Prompts, zeroshot_slides
    from eosin.report._evaluation import Context, report_crossval

    Prompts.read(prompts)
    study = (
        None
        if labels is None
        else open_study(
            features,
            labels,
            task=settings.choose("task", task, "classification"),
            target=settings.choose("target", target, None),
            group=owner(group),
            missing=missing_policy(missing),
            ids=ids_policy(ids),
            slide_table=slide_table,
        )
    )
    files = find_bags(features)
    with progress("zeroshot", len(files)) as advance:
        made = zeroshot_slides(
            files,
            prompts,
            out,
            weights=weights,
            top_k=top_k,
            allow_remote_code=allow_remote_code,
            study=study,
            progress=advance,
        )
    if study is None or made.metrics is None:
        return Done([out / SCORES], made.report)
    context = Context(title="Zero-shot classification", summary="classified by sentences, without training.")
    report_crossval(out / REPORT, made.metrics, out / PREDICTIONS, study, context)
    return Done([out / name for name in (SCORES, METRICS, PREDICTIONS, REPORT)], made.report)
