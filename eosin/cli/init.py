"""`eosin init`: a folder of slides + a table of labels → a study file with comments."""

from pathlib import Path
from typing import Annotated

import typer

from eosin.cli._arguments import LabelsIfAny, SlidesIfAny
from eosin.cli._common import STUDY_SUFFIXES, Done, command
from eosin.errors import ConfigError


@command()
def init(
    paths: Annotated[
        list[Path] | None,
        typer.Argument(metavar="[SLIDES] [TABLE]", help="Folder of slides, and table of labels.", show_default=False),
    ] = None,
    *,
    slides: SlidesIfAny = None,
    labels: LabelsIfAny = None,
    job: Annotated[Path | None, typer.Option(help="Job folder.", show_default="job, beside the file")] = None,
    out: Annotated[Path, typer.Option(help="Study file to write.")] = Path("study.yaml"),
    force: Annotated[bool, typer.Option("--force", help="Overwrite the file.")] = False,
) -> Done:
    """Write a study file with comments. Label column, task, resolution and folds are guessed from slides and table.

    Lines that you must decide are marked. `eosin check study.yaml` and `eosin run study.yaml` read the file.
    """
    from eosin._files import write_text
    from eosin._tables import SUFFIXES
    from eosin.pipeline._draft import MARK, draft_study

    tables = [path for path in paths or () if path.suffix.lower() in SUFFIXES and not path.is_dir()]
    tables += [] if labels is None else [labels]
    found = [*(path for path in paths or () if path not in tables), *(slides or ())]
    if len(tables) != 1 or not found:
        raise ConfigError("a study needs slides and one table; for example: eosin init SLIDES labels.csv")
    if out.suffix not in STUDY_SUFFIXES:
        raise ConfigError(f"{out}: name the study file .yaml")
    if out.exists() and not force:
        raise ConfigError(f"{out}: exists already; pass --force to overwrite it, or another --out")
    draft = draft_study(found, tables[0], job or out.parent / "job", out.parent)
    write_text(out, draft.text())
    decided = [f"{line.key}: {line.value}" for line in draft.lines if line.key in ("target", "task") and line.value]
    left = [f"to decide, marked {MARK} in the file: {', '.join(draft.to_decide)}"] if draft.to_decide else []
    return Done([out], lines=(*decided, *draft.warnings, *left, f"next: eosin check {out}, then eosin run {out}"))
