"""`eosin studies`: compare the options and results of the studies of a job."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from eosin.cli._common import Done, command, console
from eosin.cli._progress import say

if TYPE_CHECKING:
    from eosin.pipeline._comparison import Compared


@command()
def studies(
    job: Annotated[Path, typer.Argument(help="Job folder of eosin run.")],
    against: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Study to compare the others with.", show_default="the oldest"),
    ] = None,
) -> Done:
    """Compare the studies of a job: the options that differ, and the main metric with its interval and differences."""
    from rich.table import Table

    from eosin.pipeline._comparison import compare_studies, in_words
    from eosin.wsi._job import JobFolder

    found = compare_studies(JobFolder(job), against)
    options = list(found[0].options)
    table = Table("study", *options, "slides", "metric", "95 % interval", "difference", "95 % interval", "p")
    for one in found:
        table.add_row(one.name, *(_shown(one.options[name]) for name in options), *_measured(one))
    console().print(table)
    for one in found:
        if one.refusal:
            say(f"{one.name}: {one.refusal}")
    return Done(lines=in_words(found))


def _measured(one: "Compared") -> list[str]:
    if one.state == "unfinished":
        return ["", "unfinished", "", "", "", ""]
    cells = [str(one.n_slides), f"{one.metric} {_number(one.value)}", _interval(one.lower, one.upper)]
    difference = one.difference
    if difference is None:
        return [*cells, "not comparable" if one.refusal else "", "", ""]
    p = "undefined" if difference.p_value is None else f"{difference.p_value:.3g}"
    return [*cells, _number(difference.difference, "+"), _interval(difference.lower, difference.upper, "+"), p]


def _number(value: float | None, sign: str = "") -> str:
    return "undefined" if value is None else f"{value:{sign}.3f}"


def _interval(lower: float | None, upper: float | None, sign: str = "") -> str:
    return "undefined" if lower is None or upper is None else f"{lower:{sign}.3f} to {upper:{sign}.3f}"


def _shown(value: object) -> str:
    return "" if value is None else str(value)
