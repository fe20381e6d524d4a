"""Features, and what a model says of them, as files that other programs read: AnnData, SpatialData, QuPath, CSV."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, get_args

from eosin.errors import ConfigError, UnknownNameError
from eosin.features._bag import FeatureBag
from eosin.heatmaps._maps import map_slide
from eosin.heatmaps._subject import class_choices, predict_cells, require_same_slide
from eosin.heatmaps.export._qupath import Project
from eosin.heatmaps.export._scverse import write_anndata, write_spatialdata
from eosin.heatmaps.export._tiles import SlideTiles, write_wide
from eosin.mil._jury import Model, ask
from eosin.wsi._slide_file import SlideFile

ToolLayout = Literal["trident", "clam", "stamp"]
TableLayout = Literal["anndata", "spatialdata", "csv", "parquet"]

WRITERS = {
    "anndata": (".h5ad", write_anndata),
    "spatialdata": (".zarr", write_spatialdata),
    "csv": (".csv", write_wide),
    "parquet": (".parquet", write_wide),
}
TOOLS = get_args(ToolLayout)
LAYOUTS = (*TOOLS, *WRITERS, "qupath")


def require_layout(to: str, *, is_judged: bool, has_slides: bool, maps: str | None = None) -> None:
    """Refuse a layout that is unknown, or that cannot be written from what there is.

    Raises
    ------
    UnknownNameError
        If the layout is unknown.
    ConfigError
        If it needs a model or slides, or maps were wanted that it cannot hold.
    """
    if to not in LAYOUTS:
        raise UnknownNameError("export layout", to, LAYOUTS)
    if to == "qupath" and not (is_judged and has_slides):
        raise ConfigError("--to qupath shows a model's maps on slides; pass --model MODEL and --slides SLIDES")
    if maps is not None and (to in TOOLS or not is_judged):
        raise ConfigError(
            f"--to {to} holds features and coordinates only; remove --maps"
            if to in TOOLS
            else "--maps needs the model that the maps are of; pass --model MODEL"
        )


def collect_tiles(bag: FeatureBag, model: Model | None = None, *, maps: Sequence[str] | None = None) -> SlideTiles:
    """Return the tiles of a slide with what a model says of them.

    Parameters
    ----------
    bag : FeatureBag
    model : Path, (Aggregator, ModelCard) or Asked, optional
        As for `eosin.pipeline.explain_slide`; without a model the table holds neither maps nor a prediction.
    maps : sequence of str, optional
        Among `eosin.heatmaps._maps.ATTRIBUTIONS`; everything that the model can give unless given.

    Raises
    ------
    FeatureMismatchError
        If the features are not of the kind that the model was trained on.
    ConfigError
        If a map was wanted that the model cannot give.
    """
    if model is None:
        return SlideTiles(bag)
    asked = ask(model, bag.slide_id)
    card = asked.card
    card.features.require_match(bag.spec, Path(bag.slide_id))
    found = []
    if bag.grid is not None:
        outputs = card.load_task().columns
        found = map_slide(asked.model, bag, classes=class_choices(card), outputs=outputs, wanted=maps).maps
    return SlideTiles(bag, found, predict_cells(asked.model, card, bag), card.model_id)


def export_tiles(tiles: SlideTiles, out: Path, to: TableLayout) -> list[Path]:
    """Write the tiles of one slide as one table.

    Parameters
    ----------
    tiles : SlideTiles
    out : Path
        Receives ``<slide>.h5ad``, ``.zarr``, ``.csv`` or ``.parquet``.
    to : str
        ``anndata``, ``spatialdata``, ``csv`` or ``parquet``.

    Raises
    ------
    MissingPackageError
        If the package that writes it is not installed.
    OutputError
        If it cannot be written.
    """
    suffix, write = WRITERS[to]
    path = out / f"{tiles.bag.slide_id}{suffix}"
    write(path, tiles)
    return [path]


def add_to_project(project: Project, slide_file: SlideFile, tiles: SlideTiles) -> list[Path]:
    """Add one slide and its tiles to a project of QuPath.

    Raises
    ------
    FeatureMismatchError
        If the features are not of this slide.
    SlideError
        If the slide cannot be read.
    """
    with slide_file.open() as slide:
        require_same_slide(slide, tiles.bag)
        return [project.add(slide, tiles)]
