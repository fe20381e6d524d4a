"""`eosin import`: files of other tools → files of ours."""

from pathlib import Path
from typing import Annotated

import typer

from eosin.cli._arguments import Out
from eosin.cli._common import Done, command, say


@command()
def import_(
    file: Annotated[Path, typer.Argument(help="The file; what it is follows from its content.")],
    *,
    out: Out,
) -> Done:
    """Turn a file of another tool into features, labels and splits of ours."""
    from eosin.features.interop import import_file

    imported = import_file(file, out)
    say(f"{file} is a {imported.kind}")
    return Done(imported.paths)
