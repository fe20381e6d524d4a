"""`eosin export`: our feature files → other tools' layouts."""

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, cast

import typer

from eosin.cli._arguments import FeaturesFolder, Out
from eosin.cli._common import Done, apply_to_each, command

if TYPE_CHECKING:
    from eosin._batch import Outcome

    Layout = Literal["trident", "clam", "stamp"]


@command(bare="features")
def export(
    *,
    features: FeaturesFolder,
    to: Annotated[str, typer.Option(help="File layout of this tool: trident, clam or stamp.")],
    out: Out,
) -> Done:
    """Write feature files in the layout that TRIDENT, CLAM or STAMP reads."""
    from eosin.features._store import find_bags

    files = list(find_bags(features).values()) if features.is_dir() else [features]
    written: list[Path] = []
    report = apply_to_each(files, partial(_export, written, out, to), key=lambda path: path.stem, stage="export")
    return Done(written, report)


def _export(written: list[Path], out: Path, to: str, path: Path) -> "Outcome":
    from eosin._batch import Outcome
    from eosin.features.interop import export_bag

    written += export_bag(path, out, cast("Layout", to))
    return Outcome()
