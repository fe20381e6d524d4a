"""Everything about one slide in one call: what the model says, what it looked at, in files to open."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from eosin import __version__
from eosin.errors import FeatureMismatchError, SlideError, UnknownNameError
from eosin.features.bag import FeatureBag
from eosin.files import file_fingerprint
from eosin.heatmaps.attribution import attribution_maps, pack_bag, require_grid
from eosin.heatmaps.counterfactual import effect_map, tile_effects
from eosin.heatmaps.export.geojson import write_geojson
from eosin.heatmaps.export.png import take_view, write_png
from eosin.heatmaps.export.table import write_csv
from eosin.heatmaps.export.tiff import write_tiff
from eosin.heatmaps.heatmap import Heatmap
from eosin.heatmaps.pooled import PooledBag, Target
from eosin.heatmaps.report import ReportData, SlideCard, slide_pictures, write_report
from eosin.heatmaps.subsets import look
from eosin.mil.checkpoint import ModelCard, load_model
from eosin.mil.evaluate import compute_logits
from eosin.mil.slots import Aggregator
from eosin.mil.tasks import Binary, Classification
from eosin.wsi.slide import Slide, SlideFile, open_slide
from eosin.wsi.tissue import TissueMask, find_tissue

FORMATS = ("png", "geojson", "tiff", "csv", "html")


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
    """

    slide_id: str
    slide: Slide
    tissue: TissueMask
    maps: list[Heatmap]
    card: ModelCard
    prediction: Mapping[str, str]

    @property
    def words(self) -> str:
        """The prediction in one line."""
        return prediction_in_words(self.prediction)


def explain_slide(
    model: Path | tuple[Aggregator, ModelCard],
    slide_file: SlideFile,
    bag: FeatureBag,
    out_dir: Path,
    *,
    formats: Sequence[str] = ("png", "geojson"),
    tissue: TissueMask | None = None,
) -> list[Path]:
    """Write what a model looked at on one slide.

    Parameters
    ----------
    model : Path or (Aggregator, ModelCard)
        A model folder, or what `eosin.mil.checkpoint.load_model` returned for it.
    slide_file : SlideFile
    bag : FeatureBag
        The slide's features, of the kind that the model was trained on.
    out_dir : Path
        Gets ``<slide id>_attention.<format>``.
    formats : sequence of str
        Among `FORMATS`.
    tissue : TissueMask, optional
        Found on the slide unless given.

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
    for name in formats:
        if name not in FORMATS:
            raise UnknownNameError("heat-map format", name, FORMATS)
    aggregator, card = load_model(model) if isinstance(model, Path) else model
    card.features.require_match(bag.spec, Path(bag.slide_id))
    with open_slide(slide_file.path, mpp=slide_file.mpp) as slide:
        require_same_slide(slide, bag)
        explanation = Explanation(
            slide_id=slide_file.slide_id,
            slide=slide,
            tissue=tissue or find_tissue(slide),
            maps=_maps(aggregator, bag, card),
            card=card,
            prediction=predict_bag(aggregator, card, bag),
        )
        return [_write(name, explanation, out_dir / f"{slide_file.slide_id}_attention.{name}") for name in formats]


def require_same_slide(slide: Slide, bag: FeatureBag) -> None:
    """Refuse features that were made from another slide.

    Raises
    ------
    FeatureMismatchError
        If the size differs, or the file's fingerprint where the features carry one.
    SlideError
        Code ``empty`` if there are no tiles.
    """
    grid = require_grid(bag)
    if grid.slide_size_px0 != slide.size_px0:
        raise FeatureMismatchError(
            bag.slide_id,
            f"the features were made from a slide of {grid.slide_size_px0} pixels, {slide.path} has {slide.size_px0}; "
            "pass the slide that they came from",
        )
    fingerprint = bag.provenance.get("input_fingerprint", "")
    if fingerprint and fingerprint != file_fingerprint(slide.path):
        raise FeatureMismatchError(
            bag.slide_id,
            f"the features were made from another file than {slide.path} (same size, other content); "
            "extract them again or pass the slide that they came from",
        )
    if not bag.n_instances:
        raise SlideError(slide.path, "has no tiles on tissue, so there is no map to draw", code="empty")


def predict_bag(model: Aggregator, card: ModelCard, bag: FeatureBag) -> dict[str, str]:
    """Return the prediction for one slide, column by column, as it is printed."""
    task = card.load_task()
    columns = task.table(task.activate(compute_logits(model, [pack_bag(model, bag)])))
    return {name: _printed(values[0]) for name, values in columns.items()}


def prediction_in_words(prediction: Mapping[str, str]) -> str:
    """Return a printed prediction in one line: the class with its probability, or every column of another task."""
    chosen = prediction.get("predicted")
    probability = prediction.get(f"prob_{chosen}")
    if chosen is None or probability is None:
        return ", ".join(f"{name} {value}" for name, value in prediction.items())
    return f"{chosen}, probability {probability}"


def _printed(value: object) -> str:
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def _maps(model: Aggregator, bag: FeatureBag, card: ModelCard) -> list[Heatmap]:
    maps = attribution_maps(model, bag, classes=getattr(card.load_task(), "classes", ()))
    return [maps[0].percentile(), maps[0].relative(), *maps, *_exact_effects(model, bag, card)]


def _exact_effects(model: Aggregator, bag: FeatureBag, card: ModelCard) -> list[Heatmap]:
    """Return what each tile adds to the predicted class, where that takes no further passes of the model."""
    classes = class_choices(card)
    if not classes:
        return []
    seen = look(model, bag, single_logit_is_second_class=model.n_outputs < len(classes))
    if not isinstance(seen.subsets, PooledBag):
        return []
    predicted = int(np.argmax(seen.subsets.logits()))
    effects, _ = tile_effects(seen.subsets, Target(predicted))
    return [effect_map(effects, require_grid(bag), classes[predicted])]


def class_choices(card: ModelCard) -> tuple[str, ...]:
    """Return the classes of a model that chooses one of them, or nothing for other tasks."""
    task = card.load_task()
    return task.classes if isinstance(task, Classification | Binary) else ()


def _write(name: str, explanation: Explanation, path: Path) -> Path:
    maps, slide = explanation.maps, explanation.slide
    if name == "png":
        title = f"{explanation.slide_id}: {explanation.words}"
        write_png(path, take_view(slide), maps[0], title=title, tissue=explanation.tissue)
    elif name == "geojson":
        write_geojson(path, maps, slide_id=explanation.slide_id, bounds_px0=slide.bounds_px0)
    elif name == "tiff":
        write_tiff(path, maps[0], window_px0=slide.bounds_px0)
    elif name == "csv":
        write_csv(path, maps)
    else:
        write_report(path, _report(explanation))
    return path


def _report(explanation: Explanation) -> ReportData:
    card = explanation.card
    pictures = slide_pictures(explanation.slide, explanation.maps[0], tissue=explanation.tissue)
    return ReportData(
        title=explanation.slide_id,
        summary=f"The model says: {explanation.words}.",
        slides=(SlideCard(explanation.slide_id, explanation.prediction, pictures),),
        notes=("Attention shows what the model weighed, not which way it counted.",),
        provenance={
            "eosin": __version__,
            "model": card.model_id,
            "aggregator": card.recipe.aggregator.name,
            "encoder": card.features.encoder,
            "tiles": str(len(explanation.maps[0].values)),
        },
    )
