"""`eosin import`: files of other tools → files of ours."""

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from eosin.cli._arguments import Out
from eosin.cli._common import Done, apply_to_each, command

if TYPE_CHECKING:
    from eosin._batch import Outcome
    from eosin.features.interop import Imported, ImportOptions


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
) -> Done:
    """Convert features, coordinates, labels and splits of CLAM, TRIDENT, STAMP and other tools to eosin's files.

    The kind of each file is recognised from its content.
    """
    from eosin.features.interop import ImportOptions, find_files

    options = ImportOptions.parse(
        {"encoder": encoder, "slide": slides, "slide_mpp": slide_mpp, "coords": coords}, source="import"
    )
    imported: list[Imported] = []
    report = apply_to_each(find_files(files), partial(_import, imported, out, options), key=str, stage="import")
    return Done(list(dict.fromkeys(path for one in imported for path in one.paths)), report)


def _import(imported: "list[Imported]", out: Path, options: "ImportOptions", path: Path) -> "Outcome":
    from eosin._batch import Outcome
    from eosin.features.interop import import_file

    imported.append(import_file(path, out, options))
    return Outcome(message=imported[-1].kind)
