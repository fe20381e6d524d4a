"""Everything about one slide in one call: what the model says, what it looked at, in files to open."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from eosin import __version__
from eosin.errors import UnknownNameError
from eosin.features._bag import FeatureBag
from eosin.heatmaps._colour import scale_of
from eosin.heatmaps._heatmap import Heatmap
from eosin.heatmaps._maps import ATTRIBUTIONS, MapSet, map_slide
from eosin.heatmaps._subject import class_choices, predict_bag, prediction_in_words, require_same_slide
from eosin.heatmaps.export._geojson import write_geojson
from eosin.heatmaps.export._png import View, blend, draw, take_view, write_png
from eosin.heatmaps.export._table import tile_table, write_frame
from eosin.heatmaps.export._tiff import write_tiff
from eosin.mil._checkpoint import ModelCard
from eosin.mil._jury import Model, ask
from eosin.mil.slots import Aggregator
from eosin.report._page import Picture, ReportData, SlideCard, slide_pictures, write_report
from eosin.wsi._slide import Slide
from eosin.wsi._slide_file import SlideFile
from eosin.wsi._tissue import TissueMask, find_tissue

FORMATS = ("png", "geojson", "tiff", "scores.tiff", "csv", "parquet", "html")
PICTURE_PX = 720


@dataclass(frozen=True, eq=False)
class Explanation:
    """What there is to write about one slide.

    Parameters
    ----------
    slide_id : str
    slide : Slide
        Open.
    tissue : TissueMask
    maps : list of Heatmap
        The first is the one that pictures show.
    card : ModelCard
    prediction : mapping of str to str
        The columns of the prediction as they are printed.
    absent : mapping of str to str
        Maps that the model cannot give, and why.
    notes : tuple of str
        That the model has seen the slide, and which of several models it is.
    tag : str
        The former in a few words, for the title of a picture.
    """

    slide_id: str
    slide: Slide
    tissue: TissueMask
    maps: list[Heatmap]
    card: ModelCard
    prediction: Mapping[str, str]
    absent: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    tag: str = ""

    @property
    def words(self) -> str:
        """The prediction in one line."""
        return prediction_in_words(self.prediction)


def explain_slide(
    model: Model,
    slide_file: SlideFile,
    bag: FeatureBag,
    out_dir: Path | str,
    *,
    formats: Sequence[str] = ("png", "geojson"),
    tissue: TissueMask | None = None,
    maps: Sequence[str] | None = None,
) -> list[Path]:
    """Write what a model looked at on one slide.

    Parameters
    ----------
    model : Path, (Aggregator, ModelCard) or Asked
        A model folder, a cross-validation, of which the fold answers that has not seen the slide, what
        `eosin.mil._checkpoint.load_model` returned, or what `eosin.mil._jury.Jury.ask` did.
    slide_file : SlideFile
    bag : FeatureBag
        The slide's features, of the kind that the model was trained on.
    out_dir : Path
        Gets ``<slide id>_<map>.<format>``, named after the map that pictures show: ``alone`` unless `maps` says
        otherwise.
    formats : sequence of str
        Among `FORMATS`.
    tissue : TissueMask, optional
        Found on the slide unless given.
    maps : sequence of str, optional
        Among `eosin.heatmaps._maps.ATTRIBUTIONS`, the one that pictures show first; everything that the model can
        give unless given.

    Returns
    -------
    list of Path
        The files, in the order of `formats`.

    Raises
    ------
    FeatureMismatchError
        If the features are not of the kind that the model was trained on, or not of this slide.
    SlideError
        If the slide cannot be read; code ``empty`` if it has no tiles.
    ConfigError
        If a format is unknown, the features have no places or the model has nothing to show.
    """
    out_dir = Path(out_dir)
    require_formats(formats)
    asked = ask(model, slide_file.slide_id)
    aggregator, card = asked.model, asked.card
    card.features.require_match(bag.spec, Path(bag.slide_id))
    with slide_file.open() as slide:
        require_same_slide(slide, bag)
        found = _maps(aggregator, bag, card, maps)
        explanation = Explanation(
            slide_id=slide_file.slide_id,
            slide=slide,
            tissue=tissue or find_tissue(slide),
            maps=found.maps,
            absent=found.absent,
            card=card,
            prediction=predict_bag(aggregator, card, bag),
            notes=asked.notes,
            tag=asked.sight.tag,
        )
        stem = f"{slide_file.slide_id}_{found.maps[0].shows}"
        return [_write(name, explanation, out_dir / f"{stem}.{name}") for name in formats]


def require_formats(formats: Sequence[str]) -> None:
    """Raise `UnknownNameError` for a format that is not among `FORMATS`."""
    for name in formats:
        if name not in FORMATS:
            raise UnknownNameError("heat-map format", name, FORMATS)


def require_maps(maps: Sequence[str]) -> None:
    """Raise `UnknownNameError` for a map that is not among `eosin.heatmaps._maps.ATTRIBUTIONS`."""
    for name in maps:
        if name not in ATTRIBUTIONS:
            raise UnknownNameError("map", name, ATTRIBUTIONS)


def _maps(model: Aggregator, bag: FeatureBag, card: ModelCard, wanted: Sequence[str] | None) -> MapSet:
    columns = card.load_task().columns
    return map_slide(model, bag, classes=class_choices(card), outputs=columns, wanted=wanted)


def _write(name: str, explanation: Explanation, path: Path) -> Path:
    maps, slide = explanation.maps, explanation.slide
    if name == "png":
        title = f"{explanation.slide_id}: {explanation.words}{f' ({explanation.tag})' * bool(explanation.tag)}"
        write_png(path, take_view(slide), maps[0], title=title, tissue=explanation.tissue)
    elif name == "geojson":
        write_geojson(path, maps, slide_id=explanation.slide_id, bounds_px0=slide.bounds_px0)
    elif name == "tiff":
        write_tiff(path, maps[0], window_px0=slide.bounds_px0)
    elif name == "scores.tiff":
        write_tiff(path, maps[0], content="scores", window_px0=slide.bounds_px0)
    elif name in ("csv", "parquet"):
        write_frame(path, tile_table(maps))
    else:
        write_report(path, _report(explanation))
    return path


def _report(explanation: Explanation) -> ReportData:
    card = explanation.card
    slide_picture, *_ = slide_pictures(explanation.slide, explanation.maps[0], tissue=explanation.tissue)
    view = take_view(explanation.slide, longest_px=PICTURE_PX)
    pictures = [map_picture(view, heatmap, tissue=explanation.tissue) for heatmap in _shown(explanation.maps)]
    return ReportData(
        title=explanation.slide_id,
        summary=" ".join((f"The model says: {explanation.words}.", *explanation.notes)),
        slides=(SlideCard(explanation.slide_id, explanation.prediction, (slide_picture, *pictures)),),
        notes=(
            "Attention shows what the model weighed, not which way it counted; a tile alone shows what the model says "
            "of it whatever else is on the slide; effects show what the prediction would lose without the tile, which "
            "is little where many tiles say the same.",
            *(f"Not shown, {name.replace('_', ' ')}: {reason}." for name, reason in explanation.absent.items()),
        ),
        provenance={
            "eosin": __version__,
            "model": card.model_id,
            "aggregator": card.recipe.aggregator.name,
            "encoder": card.features.encoder,
            "tiles": str(len(explanation.maps[0].values)),
        },
    )


def map_picture(view: View, heatmap: Heatmap, *, tissue: TissueMask | None = None) -> Picture:
    """Return one map over a view of its slide, with its colour scale."""
    scale = scale_of(heatmap)
    return Picture(draw(view, blend(view, heatmap, scale, tissue=tissue)), heatmap.caption, scale)


def _shown(maps: Sequence[Heatmap]) -> list[Heatmap]:
    """Return the maps worth a picture: of several scalings of one score, the percentile."""
    ranked = {(heatmap.shows, heatmap.of) for heatmap in maps if heatmap.scaling == "percentile"}
    return [one for one in maps if one.scaling == "percentile" or (one.shows, one.of) not in ranked]
