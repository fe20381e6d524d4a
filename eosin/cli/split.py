"""`eosin split`: label table → splits by patient."""

from typing import TYPE_CHECKING, Annotated, Literal, cast

import typer

from eosin.cli._arguments import Group, Labels, Out, Target, TaskKind
from eosin.cli._common import Done, Settings, command, say

if TYPE_CHECKING:
    SplitKind = Literal["kfold", "monte-carlo"]

KINDS = ("kfold", "monte-carlo")


@command("task", "target", "folds")
def split(
    *,
    labels: Labels,
    folds: Annotated[int | None, typer.Option(help="Number of splits.", show_default="5")] = None,
    group: Group = "patient",
    out: Out,
    task: TaskKind = None,
    target: Target = None,
    kind: Annotated[str, typer.Option(help="kfold tests every slide once; monte-carlo draws independently.")] = "kfold",
    val_fraction: Annotated[float, typer.Option(help="Share of the patients that selects the model.")] = 0.15,
    seed: Annotated[int, typer.Option(help="Of the draws.")] = 0,
    settings: Settings,
) -> Done:
    """Deal slides out to training, validation and test, stratified by label; a patient is never on two sides."""
    from eosin.cli._study import SITE, owner
    from eosin.errors import UnknownNameError
    from eosin.mil.data import read_labels
    from eosin.mil.splits import Cohort, make_splits, write_splits
    from eosin.mil.tasks import make_task

    if kind not in KINDS:
        raise UnknownNameError("kind of split", kind, KINDS)
    table = read_labels(labels, group=owner(group))
    column = table.target_column(settings.choose("target", target, None))
    rows = table.rows()
    strata = make_task(settings.choose("task", task, "classification"), rows, target=column).strata(rows)
    if group == SITE:
        table.require([SITE])
    sites = table.values[SITE] if group == SITE else ()
    cohort = Cohort(table.slide_ids, table.patient_ids, tuple(strata), sites)
    splits = make_splits(
        cohort,
        folds=settings.choose("folds", folds, 5),
        kind=cast("SplitKind", kind),
        val_fraction=val_fraction,
        seed=seed,
    )
    write_splits(out, splits, cohort)
    say("; ".join(table.notes))
    return Done([out])
