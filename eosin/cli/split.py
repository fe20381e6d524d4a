"""`eosin split`: label table → splits by patient."""

from typing import Annotated, cast

import typer

from eosin.cli._arguments import Group, IdsPolicy, Labels, Out, Target, TaskKind
from eosin.cli._common import Done, command
from eosin.cli._progress import say
from eosin.cli._settings import Settings
from eosin.cli._study import SlideTable, ids_policy

NESTED = "nested"
KINDS = ("kfold", "monte-carlo", "holdout", NESTED)
KIND_HELP = (
    "kfold: every slide is tested once. monte-carlo: independent random draws. holdout: one test part, rotating "
    "validation parts. nested: rotating validation parts inside each fold."
)


@command(
    "task", "target", "folds",
    rare=("slide_table", "ids", "inner_folds", "val_fraction", "test_fraction"),
    of_job={"out": "splits"},
)  # fmt: skip
def split(
    *,
    labels: Labels,
    slide_table: SlideTable = None,
    folds: Annotated[int | None, typer.Option(help="Number of splits.", show_default="5")] = None,
    group: Group = "patient",
    ids: IdsPolicy = "ask",
    out: Out,
    task: TaskKind = None,
    target: Target = None,
    kind: Annotated[str, typer.Option(help=KIND_HELP)] = "kfold",
    inner_folds: Annotated[int, typer.Option(help="Number of inner folds, for nested.")] = 5,
    val_fraction: Annotated[float, typer.Option(help="Share of patients for validation, 0 to 1.")] = 0.15,
    test_fraction: Annotated[
        float, typer.Option(help="Share of patients for testing, 0 to 1; for monte-carlo and holdout.")
    ] = 0.2,
    seed: Annotated[int, typer.Option(help="Seed of the random draws.")] = 0,
    settings: Settings,
) -> Done:
    """Split slides into training, validation and test parts, stratified by label.

    All slides of a patient are in the same part.
    """
    from eosin.errors import UnknownNameError
    from eosin.mil._splits import SplitKind, make_nested_splits, make_splits
    from eosin.mil._study import (
        SITE,
        confounded_sites,
        label_cohort,
        note_on_sites,
        open_labels,
        owner,
        pose_task,
        write_all_splits,
    )

    if kind not in KINDS:
        raise UnknownNameError("kind of split", kind, KINDS)
    table = open_labels(labels, slide_table=slide_table, group=owner(group), ids=ids_policy(ids))
    posed = pose_task(settings.choose("task", task, "classification"), table, settings.choose("target", target, None))
    cohort = label_cohort(table, posed, keep_sites=group == SITE)
    number = settings.choose("folds", folds, 5)
    if kind == NESTED:
        nested = make_nested_splits(cohort, folds=number, inner_folds=inner_folds, seed=seed)
    else:
        kind_ = cast("SplitKind", kind)
        fractions = {"val_fraction": val_fraction, "test_fraction": test_fraction}
        nested = [make_splits(cohort, folds=number, kind=kind_, seed=seed, **fractions)]
    write_all_splits(out, nested, cohort)
    sites = [note_on_sites(table)] if group == SITE else []
    sites += confounded_sites(table, posed)
    say("; ".join((*table.notes, *sites, posed.describe(table.rows()))))
    return Done([out])
