"""The counterfactual examination of one slide as files: table, QuPath tiles, picture and report."""

import logging
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image

from eosin import __version__
from eosin.errors import ConfigError, UnknownNameError
from eosin.features._bag import FeatureBag
from eosin.features._store import read_bag
from eosin.heatmaps._annotations import read_regions, tiles_inside
from eosin.heatmaps._counterfactual import Effect, as_probability
from eosin.heatmaps._examination import Donor, Questions, examine
from eosin.heatmaps._findings import Counterfactuals
from eosin.heatmaps._heatmap import Heatmap, Window
from eosin.heatmaps._subject import predict_bag, prediction_in_words, require_grid, require_same_slide
from eosin.heatmaps.export._geojson import write_geojson
from eosin.heatmaps.export._png import DPI, render, take_view, write_png
from eosin.heatmaps.export._table import write_frame
from eosin.mil._checkpoint import ModelCard
from eosin.mil._jury import Asked, Model, ask
from eosin.mil._seen import donor_notes, donor_parts
from eosin.mil.subsets import Indices
from eosin.report._page import Picture, ReportData, SlideCard, slide_pictures, write_report
from eosin.wsi._picture import write_picture
from eosin.wsi._slide import Slide
from eosin.wsi._slide_file import SlideFile
from eosin.wsi._tissue import find_tissue

logger = logging.getLogger(__name__)

FORMATS = ("csv", "parquet", "geojson", "png", "figure.png", "html")


@dataclass(frozen=True)
class DonorFile:
    """A slide whose tiles are added to others.

    Parameters
    ----------
    features : Path
        Its feature file.
    slide_file : SlideFile, optional
        Checked against the features, and needed for annotations of a slide that states a scanned box.
    annotation : Path, optional
        GeoJSON whose regions are added, besides the most attended tiles.
    """

    features: Path
    slide_file: SlideFile | None = None
    annotation: Path | None = None


def draw_curves(found: Counterfactuals) -> Picture:
    """Return the figure of the probability against the share of tiles that was removed, by order of removal."""
    figure = Figure(figsize=(5.4, 3.8), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    styles = {"greedy": ("#b35806", "-"), "random": ("0.45", "--")}
    for name, curve in found.curves.groupby("order", sort=False):
        colour, line = styles.get(str(name), ("#440154", "-"))
        label = {"greedy": "largest effect first", "random": "random tiles"}.get(str(name), f"{name} first")
        axes.plot(100 * curve.share, curve.probability, color=colour, linestyle=line, label=label)
        if name == "random":
            axes.fill_between(100 * curve.share, curve.low, curve.high, color="0.85", linewidth=0)
    axes.set(xlabel="tiles removed (%)", ylabel=f"probability of {found.class_name}", ylim=(-0.02, 1.02))
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    return Picture(
        render(figure), f"Probability of {found.class_name} as tiles are removed; grey: range of random draws"
    )


def counterfactual_maps(found: Counterfactuals, bag: FeatureBag) -> list[Heatmap]:
    """Return the effect of each tile, the percentile of its attention and the round in which the search removed it."""
    grid = require_grid(bag)
    rounds = np.zeros(grid.n_tiles)
    rounds[found.search.order] = np.arange(1, len(found.search.order) + 1)
    what = f"what a tile adds to the log-odds of {found.class_name}"
    effect = Heatmap(found.tile_effects, grid, "effect", what, signed=True)
    ranking = Heatmap(found.ranking, grid, found.ranking_name.replace(" ", "_"), found.ranking_name).percentile()
    return [effect, ranking, Heatmap(rounds, grid, "removal_round", "round of removal (0: not removed)")]


def question_slide(
    model: Model,
    bag: FeatureBag,
    out_dir: Path | str,
    *,
    slide_file: SlideFile | None = None,
    class_name: str | None = None,
    annotation: Path | str | None = None,
    region_classes: Sequence[str] = (),
    donors: Sequence[DonorFile] = (),
    questions: Questions = Questions(),  # noqa: B008 - frozen
    formats: Sequence[str] = ("csv", "geojson", "html"),
) -> list[Path]:
    """Write the counterfactual examination of one slide.

    Parameters
    ----------
    model : Path, (Aggregator, ModelCard) or Asked
        As `eosin.pipeline._explain.explain_slide`; whether it has seen the slide is said in every file.
    bag : FeatureBag
        Of the kind that the model was trained on.
    out_dir : Path
        Gets ``<slide id>_counterfactual.<format>``.
    slide_file : SlideFile, optional
        Needed for pictures, and for GeoJSON and annotations of slides that state a scanned box.
    class_name : str, optional
        The class to ask about; the predicted one unless given.
    annotation : Path, optional
        GeoJSON of QuPath: its regions are removed and kept alone.
    region_classes : sequence of str
        The classes of regions to ask about, each by itself; all regions together unless given.
    donors : sequence of DonorFile
        Slides whose most attended, and annotated, tiles are added.
    questions : Questions
    formats : sequence of str
        Among `FORMATS`.

    Returns
    -------
    list of Path

    Raises
    ------
    FeatureMismatchError, SlideError, ConfigError
        As `eosin.pipeline._explain.explain_slide`, `eosin.heatmaps._examination.examine` and
        `eosin.heatmaps._annotations.read_regions`.
    """
    out_dir = Path(out_dir)
    annotation = None if annotation is None else Path(annotation)
    require_formats(formats, has_slide=slide_file is not None)
    asked = ask(model, bag.slide_id)
    aggregator, card = asked.model, asked.card
    card.features.require_match(bag.spec, Path(bag.slide_id))
    with open_optional(slide_file) as slide:
        if slide is not None:
            require_same_slide(slide, bag)
        bounds = None if slide is None else slide.bounds_px0
        regions = {} if annotation is None else read_sets(annotation, bag, bounds, region_classes)
        given = [open_donor(donor, card, region_classes) for donor in donors]
        asked = asked.with_donors(donor.bag.slide_id for donor in given)
        for note in donor_notes(asked.donors):
            logger.warning("%s", note)
        found = examine(
            aggregator,
            card,
            bag,
            class_name=class_name,
            regions=regions,
            donors=given,
            questions=questions,
            tissue=tissue_shares(slide, bag, questions),
        )
        return write_findings(found, bag, slide, asked, out_dir, formats=formats)


def tissue_shares(slide: Slide | None, bag: FeatureBag, questions: Questions) -> NDArray[np.float64] | None:
    """Return the share of each tile that is tissue, (n,), where random sets are to be matched by it."""
    if slide is None or questions.matched != "tissue":
        return None
    return find_tissue(slide).fraction(require_grid(bag).boxes_px0())


def require_formats(formats: Sequence[str], *, has_slide: bool) -> None:
    """Raise `ConfigError` for an unknown format, and for a picture without a slide."""
    for name in formats:
        if name not in FORMATS:
            raise UnknownNameError("counterfactual format", name, FORMATS)
    if "png" in formats and not has_slide:
        raise ConfigError("the picture of a counterfactual needs the slide; pass --slides, or remove png from --format")


def write_findings(
    found: Counterfactuals,
    bag: FeatureBag,
    slide: Slide | None,
    asked: Asked,
    out_dir: Path,
    *,
    formats: Sequence[str],
) -> list[Path]:
    """Write what came out as ``<slide id>_counterfactual.<format>`` and return the paths."""
    paths = [out_dir / f"{bag.slide_id}_counterfactual.{name}" for name in formats]
    prediction = predict_bag(asked.model, asked.card, bag)
    for name, path in zip(formats, paths, strict=True):
        _write(name, path, found, bag, slide=slide, asked=asked, prediction=prediction)
    return paths


def open_donor(donor: DonorFile, card: ModelCard, region_classes: Sequence[str] = ()) -> Donor:
    """Read a donor's features and regions.

    Raises
    ------
    FeatureMismatchError, ConfigError
        If the features are not of the model's kind, of another slide or without tiles, or a region does not fit.
    """
    bag = read_bag(donor.features)
    card.features.require_match(bag.spec, donor.features)
    if not bag.n_instances:
        raise ConfigError(f"{donor.features}: has no tiles to add to another slide")
    with open_optional(donor.slide_file) as slide:
        if slide is not None:
            require_same_slide(slide, bag)
        bounds = None if slide is None else slide.bounds_px0
        regions = {} if donor.annotation is None else read_sets(donor.annotation, bag, bounds, region_classes)
    return Donor(bag, regions)


def open_optional(slide_file: SlideFile | None) -> AbstractContextManager[Slide | None]:
    """Return the open slide, or None where there is none."""
    return nullcontext() if slide_file is None else slide_file.open()


def read_sets(
    annotation: Path, bag: FeatureBag, bounds_px0: Window | None, classes: Sequence[str]
) -> dict[str, Indices]:
    """Return the tiles inside the regions of an annotation, by what they are called in sentences.

    Raises
    ------
    ConfigError
        As `read_regions` and `tiles_inside`, and if there is no tile in one of the classes.
    """
    grid = require_grid(bag)
    wanted: list[tuple[str, Sequence[str]]] = [(f"tiles in {name}", [name]) for name in classes]
    sets = {
        what: tiles_inside(grid, read_regions(annotation, bounds_px0=bounds_px0, classes=names))
        for what, names in wanted or [("annotated tiles", ())]
    }
    empty = [what for what, index in sets.items() if not len(index)]
    if empty:
        raise ConfigError(f"{annotation}: there are no {' and no '.join(empty)} of {bag.slide_id}")
    return sets


def _write(
    name: str,
    path: Path,
    found: Counterfactuals,
    bag: FeatureBag,
    *,
    slide: Slide | None,
    asked: Asked,
    prediction: Mapping[str, str],
) -> None:
    bounds = None if slide is None else slide.bounds_px0
    if name in ("csv", "parquet"):
        write_frame(path, seen_table(found, asked))
    elif name == "geojson":
        write_geojson(path, counterfactual_maps(found, bag), slide_id=found.slide_id, bounds_px0=bounds)
    elif name == "figure.png":
        write_picture(path, Image.fromarray(draw_curves(found).image), dpi=(DPI, DPI))
    elif name == "png" and slide is not None:
        tag = asked.sight.tag
        title = f"{found.slide_id}: {prediction_in_words(prediction)}{f' ({tag})' * bool(tag)}"
        write_png(path, take_view(slide), counterfactual_maps(found, bag)[0], title=title)
    else:
        write_report(path, counterfactual_report(found, bag, slide, asked, prediction))


def seen_table(found: Counterfactuals, asked: Asked) -> pd.DataFrame:
    """Return the table of a slide's effects, with what the model has seen of it where that is known."""
    table = found.table()
    if asked.donors:
        table = table.assign(donor_seen=donor_parts(table["tiles"], asked.donors))
    return table if asked.choice is None else table.assign(seen=asked.sight.part, answered_by=asked.choice.how)


def counterfactual_report(
    found: Counterfactuals, bag: FeatureBag, slide: Slide | None, asked: Asked, prediction: Mapping[str, str]
) -> ReportData:
    """Return the report of one slide: sentences, curves, map, table of every intervention."""
    pictures = () if slide is None else slide_pictures(slide, counterfactual_maps(found, bag)[0])
    sentences, card = (*asked.notes, *found.sentences()), asked.card
    return ReportData(
        title=f"{found.slide_id}: counterfactuals",
        summary=f"What the prediction of {found.class_name} depends on, measured by removing tiles.",
        slides=(SlideCard(found.slide_id, prediction, (draw_curves(found), *pictures), sentences),),
        tables={f"Interventions on {found.class_name}": printed_effects(found.effects)},
        notes=(
            "Effects are those of this model on this slide; they say what the model uses, not what causes the disease.",
            f"Every set of tiles is compared with {found.effects[0].n_controls} random sets of as many tiles; p is the "
            "share of sets, itself included, that change the log-odds at least as much in the same direction, and is "
            "left out for sets that were searched for, which beat random sets by construction; the effect size is "
            "the distance from the mean of the random sets in their standard deviations.",
        ),
        provenance={
            "eosin": __version__,
            "model": card.model_id,
            "aggregator": card.recipe.aggregator.name,
            "encoder": card.features.encoder,
            "tiles": str(found.n_tiles),
        },
    )


def printed_effects(effects: Sequence[Effect]) -> pd.DataFrame:
    """Return the table of a report: one row per intervention, numbers as they are printed."""
    rows = [
        {
            "Intervention": f"{effect.kind} {effect.what}",
            "Tiles": effect.n_tiles,
            "Probability": f"{as_probability(effect.probability_before)} → {as_probability(effect.probability_after)}",
            "Log-odds": f"{effect.before:.2f} → {effect.after:.2f}",
            "Random tiles, log-odds": _printed_range(effect),
            "Effect size": "–" if effect.effect_size is None else f"{effect.effect_size:+.1f} SD",
            "p": "–" if effect.control_rank is None else f"{effect.control_rank:.2g}",
        }
        for effect in effects
    ]
    return pd.DataFrame(rows)


def _printed_range(effect: Effect) -> str:
    if effect.control_mean is None:
        return "–"
    return f"{effect.control_mean:.2f} ({effect.control_low:.2f} to {effect.control_high:.2f})"
