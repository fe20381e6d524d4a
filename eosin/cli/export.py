"""`eosin export`: our feature files, and what a model says of them → other tools' files."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, cast

import typer

from eosin.cli._arguments import FeaturesFolder, Out, SlidesIfAny
from eosin.cli._common import Done, apply_to_each, command

if TYPE_CHECKING:
    from eosin._batch import Outcome
    from eosin.features._bag import FeatureBag
    from eosin.heatmaps.export._tiles import SlideTiles
    from eosin.mil._jury import Jury

    ToolLayout = Literal["trident", "clam", "stamp"]
    TableLayout = Literal["anndata", "spatialdata", "csv", "parquet"]


@command(bare="features")
def export(
    *,
    features: FeaturesFolder,
    to: Annotated[
        str,
        typer.Option(
            help="trident, clam, stamp: features in the layout of this tool. anndata, spatialdata, csv, parquet: one "
            "table of tiles per slide. qupath: a project with the slides and their maps."
        ),
    ],
    model: Annotated[
        Path | None,
        typer.Option(help="Model or cross-validation folder; adds its maps and predictions to the tiles."),
    ] = None,
    slides: SlidesIfAny = None,
    maps: Annotated[
        str | None,
        typer.Option(help="Maps to add, as for eosin heatmap.", show_default="all that the model can give"),
    ] = None,
    out: Out,
) -> Done:
    """Write features, and what a model says of them, for other programs.

    AnnData, SpatialData, CSV and parquet: rows are tiles, with their coordinates, maps and predictions. QuPath: open
    the project and run its script import_eosin (docs/qupath.md).
    """
    from eosin.features._store import find_bags
    from eosin.mil._jury import Jury
    from eosin.pipeline._data_out import TOOLS, require_layout

    require_layout(to, is_judged=model is not None, has_slides=bool(slides), maps=maps)
    files = find_bags(features) if features.is_dir() else {features.stem: features}
    jury = None if model is None else Jury.open([model], device="cpu")
    wanted = None if maps is None else maps.split(",")
    if to == "qupath":
        return _export_project(files, slides or [], cast("Jury", jury), wanted, out)
    written: list[Path] = []

    def work(path: Path) -> "Outcome":
        from eosin._batch import Outcome
        from eosin.features._store import read_bag
        from eosin.features.interop import export_bag
        from eosin.pipeline._data_out import export_tiles

        if to in TOOLS:
            written.extend(export_bag(path, out, cast("ToolLayout", to)))
            return Outcome()
        bag = read_bag(path, verify=True)
        if jury is not None and not bag.n_instances:
            return Outcome("empty", "no tiles")
        written.extend(export_tiles(_collect(bag, jury, wanted), out, cast("TableLayout", to)))
        return Outcome()

    report = apply_to_each(list(files.values()), work, key=lambda path: path.stem, stage="export")
    return Done(written, report)


def _collect(bag: "FeatureBag", jury: "Jury | None", wanted: list[str] | None) -> "SlideTiles":
    from eosin.pipeline._data_out import collect_tiles

    return collect_tiles(bag, None if jury is None else jury.ask(bag.slide_id), maps=wanted)


def _export_project(
    files: dict[str, Path], slides: list[Path], jury: "Jury", wanted: list[str] | None, out: Path
) -> Done:
    from eosin._batch import Outcome
    from eosin.errors import FeatureFileError
    from eosin.features._store import read_bag
    from eosin.heatmaps.export._qupath import Project
    from eosin.pipeline._data_out import add_to_project
    from eosin.wsi._slide_file import SlideFile, find_slides

    project = Project.open(out)

    def work(slide: SlideFile) -> Outcome:
        path = files.get(slide.slide_id)
        if path is None:
            raise FeatureFileError(slide.path, "has no feature file of its name; extract it first, or check --features")
        bag = read_bag(path, verify=True)
        if not bag.n_instances:
            return Outcome("empty", "no tiles")
        add_to_project(project, slide, _collect(bag, jury, wanted))
        return Outcome()

    report = apply_to_each(find_slides(slides), work, key=lambda slide: slide.slide_id, stage="export")
    return Done(project.save(), report)
