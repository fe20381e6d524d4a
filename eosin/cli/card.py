"""`eosin card`: a finished run → its model card as Markdown."""

from pathlib import Path
from typing import Annotated

import typer

from eosin.cli._arguments import StudyName
from eosin.cli._common import Done, command

CARD = "model_card.md"


@command(bare="job", of_job={})
def card(
    *,
    job: Annotated[Path, typer.Option(help="Folder of eosin run, crossval or train.")],
    study_name: StudyName = None,
    out: Annotated[Path | None, typer.Option(help="File to write.", show_default=f"{CARD} in the folder")] = None,
) -> Done:
    """Write the model card of a run: data, splits, performance, intended use and limits, as Markdown.

    Items of TRIPOD+AI and CLAIM are filled as far as the run can state them. The others are marked as open.
    """
    from eosin._files import write_text
    from eosin.pipeline._card import card_of_run
    from eosin.report._card import card_markdown, open_items

    parts = card_of_run(job, study_name)
    path = out or job / CARD
    write_text(path, card_markdown(f"Model card: {job.absolute().name}", parts))
    return Done([path], lines=(f"{len(open_items(parts))} items are open; a person must write them",))
