"""`eosin import`: files of other tools → files of ours."""

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from eosin.cli._arguments import Out
from eosin.cli._common import Done, apply_to_each, command
from eosin.cli._progress import say
from eosin.errors import ConfigError

if TYPE_CHECKING:
    from eosin._batch import Outcome
    from eosin.features.interop import Imported, ImportOptions

CONTRADICTION = "contradiction"


@command()
def import_(
    files: Annotated[
        list[Path], typer.Argument(metavar="FILES", help="Files, or folders that are searched for files.")
    ],
    *,
    out: Out,
    encoder: Annotated[str | None, typer.Option(help="Encoder of the features, if the file does not state it.")] = None,
    slides: Annotated[
        Path | None, typer.Option(help="Slide file, or folder of slides, to read mpp and size from.")
    ] = None,
    slide_mpp: Annotated[float | None, typer.Option(help="True µm/px of the slides at level 0.")] = None,
    coords: Annotated[
        Path | None, typer.Option(help="File or folder with tile coordinates, for features without them.")
    ] = None,
    tile_size: Annotated[
        int | None, typer.Option(help="Side of a tile in level-0 pixels, for coordinates that do not state it.", min=1)
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Import files that contradict the slide or an option, and note it.")
    ] = False,
) -> Done:
    """Convert features, coordinates, labels and splits of CLAM, TRIDENT, STAMP and other tools to eosin's files.

    The kind of each file is recognised from its content; several files of one slide are joined.
    """
    from eosin.features.interop import ImportOptions, find_files, group_files

    stated = {
        "encoder": encoder, "slide": slides, "slide_mpp": slide_mpp, "coords": coords, "tile_size": tile_size,
        "force": force,
    }  # fmt: skip
    options = ImportOptions.parse(stated, source="import")
    imported: list[Imported] = []
    work = partial(_import, imported, out, options)
    report = apply_to_each(group_files(find_files(files)), work, key=lambda group: str(group[0]), stage="import")
    if report.failed and all(record.reason == CONTRADICTION for record in report.records):
        others = f" (and {len(report.failed) - 1} more alike)" if len(report.failed) > 1 else ""
        raise ConfigError(f"{report.failed[0].message}{others}")
    return Done(list(dict.fromkeys(path for one in imported for path in one.paths)), report)


def _import(imported: "list[Imported]", out: Path, options: "ImportOptions", group: list[Path]) -> "Outcome":
    from eosin._batch import Outcome
    from eosin.features.interop import import_slide

    imported.append(import_slide(group, out, options))
    for note in imported[-1].notes:
        say(f"{group[0]}: {note}")
    return Outcome(message=imported[-1].kind)
