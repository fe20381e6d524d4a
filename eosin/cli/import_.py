"""`eosin import`: files of other tools → files of ours."""

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from eosin.cli._arguments import Out
from eosin.cli._common import Done, apply_to_each, command

if TYPE_CHECKING:
    from eosin.batch import Outcome
    from eosin.features.interop import Imported, ImportOptions


@command()
def import_(
    files: Annotated[list[Path], typer.Argument(metavar="FILES", help="What each is follows from its content.")],
    *,
    out: Out,
    encoder: Annotated[str | None, typer.Option(help="Encoder that made the features, if the file is silent.")] = None,
    slide: Annotated[Path | None, typer.Option(help="The slide, for its mpp, size and fingerprint.")] = None,
    slide_mpp: Annotated[float | None, typer.Option(help="µm per level-0 pixel of the slides.")] = None,
    coords: Annotated[Path | None, typer.Option(help="Coordinates file of features that have no places.")] = None,
) -> Done:
    """Turn files of CLAM, TRIDENT, STAMP and others into features, coordinates, labels and splits of ours."""
    from eosin.features.interop import ImportOptions

    options = ImportOptions.parse(
        {"encoder": encoder, "slide": slide, "slide_mpp": slide_mpp, "coords": coords}, source="import"
    )
    imported: list[Imported] = []
    report = apply_to_each(files, partial(_import, imported, out, options), key=str, stage="import")
    return Done(list(dict.fromkeys(path for one in imported for path in one.paths)), report)


def _import(imported: "list[Imported]", out: Path, options: "ImportOptions", path: Path) -> "Outcome":
    from eosin.batch import Outcome
    from eosin.features.interop import import_file

    imported.append(import_file(path, out, options))
    return Outcome(message=imported[-1].kind)
