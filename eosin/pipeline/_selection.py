"""Tiles for a second stage: where the attention of a first model, at a lower magnification, says that it matters.

The rule is that of `eosin.mil.methods.two_stage`; here are the files around it. A slide's tiles are chosen by models
that have not seen its patient: of a cross-validation the model of its test fold, for a slide that no fold has seen the
mean of all. What the coordinates rest on is stored in them.
"""

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from eosin._batch import Outcome, run_batch
from eosin._files import file_fingerprint
from eosin._fingerprints import fingerprint
from eosin._records import Record, Report
from eosin._spread import find_file, list_files
from eosin.errors import ConfigError, EosinError, FeatureFileError, SlideError
from eosin.features._bag import FeatureBag, FeatureSpec
from eosin.features._encoders import folder_name
from eosin.features._store import find_bags, read_bag, read_footer, read_spec
from eosin.heatmaps._maps import attention_weights
from eosin.mil._checkpoint import ModelCard, load_card, load_model
from eosin.mil._seen import Run
from eosin.mil._selection import child_grid, select_tiles, tile_ratio
from eosin.mil._tables import shown
from eosin.mil.slots import Aggregator, AttentionOutput
from eosin.options import Options
from eosin.wsi._coordinates import read_footer as read_coords_footer
from eosin.wsi._coordinates import write_grid
from eosin.wsi._geojson import qupath_origin, read_outline
from eosin.wsi._grid import TileGrid, Tiling
from eosin.wsi._job import JobFolder
from eosin.wsi._slide import Slide
from eosin.wsi._slide_file import SlideFile
from eosin.wsi._tissue import TissueMask, find_tissue, tissue_from_outline

RULE = "attention per cluster of features"
MODELS_KEPT = 16
MPP_TOLERANCE = 1e-3

logger = logging.getLogger(__name__)


class Selection(Options):
    """How tiles of the first stage are chosen, see `eosin.mil._selection.select_tiles`.

    Attributes
    ----------
    budget : int
        Most tiles of the first stage per slide; each becomes ratio × ratio tiles of the second.
    clusters, components : int
        Groups of alike tiles that share the budget, and principal components that tell them apart.
    seed : int
    """

    budget: int = Field(default=64, ge=1)
    clusters: int = Field(default=4, ge=1)
    components: int = Field(default=32, ge=1)
    seed: int = Field(default=0, ge=0)

    def folder(self, tiling: Tiling) -> str:
        """Name of the tiling's folder in a job, for example ``1mpp_256px_0px_overlap_budget64``."""
        return f"{tiling.folder}_budget{self.budget}"


def tile_selected(
    slides: Sequence[SlideFile],
    job: JobFolder,
    run: Path,
    tiling: Tiling,
    *,
    selection: Selection | None = None,
    features: Path | None = None,
    allow_seen: bool = False,
    workers: int = 0,
    shard: tuple[int, int] = (0, 1),
    timeout_s: float | None = None,
    progress: Callable[[Record], None] | None = None,
) -> Report:
    """Write the coordinates of the second stage: the parts, at a finer mpp, of the tiles that a first model attends to.

    A slide whose coordinates file was made from the same slide, features, models and options is skipped. A slide
    without tiles in the first stage ends as ``empty`` with a file of no rows; of a slide with fewer tiles than the
    budget all are taken.

    Parameters
    ----------
    slides : sequence of SlideFile
        From `eosin.wsi._slide_file.find_slides`.
    job : JobFolder
        Receives ``<tiling>_budget<n>/patches/<slide>_patches.h5``.
    run : Path
        Folder of the first stage's model, cross-validation or job; its models must weigh tiles.
    tiling : Tiling
        Of the second stage; a part of a chosen tile needs its `min_tissue`, too.
    selection : Selection, optional
        The defaults otherwise.
    features : Path, optional
        Folder of the first stage's features; found in the job unless given.
    allow_seen : bool
        Whether a slide that every model has seen, or may have seen, is still tiled, with a warning and a note in
        its file, instead of failing.
    workers, shard, timeout_s, progress
        As of `eosin.wsi._job.tile_slides`.

    Returns
    -------
    Report
        Failed slides carry a reason: ``seen``, ``no-features``, ``changed`` or the reader's.

    Raises
    ------
    CheckpointError
        If there is no model.
    ConfigError
        If the models do not weigh tiles or know no mpp, the tilings do not fit together, or the features are not found.
    FeatureMismatchError
        If the features given are not those that the models were trained on.
    """
    plan = make_plan(job, run, tiling, selection or Selection(), features=features, allow_seen=allow_seen)
    plan.warn_of_seen(slides[shard[0] :: shard[1]])
    return run_batch(
        slides,
        partial(_select, plan),
        key=_slide_id,
        stage=f"select {plan.folder}",
        is_done=partial(_is_selected, plan),
        run_json=job.run_json,
        workers=workers,
        shard=shard,
        timeout_s=timeout_s,
        progress=progress,
    )


@dataclass(frozen=True)
class SelectionPlan:
    """What is done to every slide: picklable, sent to workers.

    Attributes
    ----------
    job : JobFolder
    run : Run
        The models and what they have seen.
    ids : dict of Path to str
        Identity of each model.
    spec : FeatureSpec
        What the models were trained on.
    tiling : Tiling
    selection : Selection
    features : Path
        Folder of the first stage's features.
    allow_seen : bool
    """

    job: JobFolder
    run: Run
    ids: dict[Path, str]
    spec: FeatureSpec
    tiling: Tiling
    selection: Selection
    features: Path
    allow_seen: bool

    @property
    def folder(self) -> str:
        """Name of the folder of the coordinates."""
        return self.selection.folder(self.tiling)

    def patches(self, slide_id: str) -> Path:
        """Coordinates file of a slide."""
        return self.job.patches(self.folder, slide_id)

    def stage_one(self, slide_id: str) -> Path:
        """Feature file of a slide in the first stage."""
        return find_file(self.features, slide_id, ".h5")

    def outline(self, slide_id: str) -> Path:
        """Tissue outline that the first stage wrote, or a person edited."""
        return JobFolder(self.features.parent.parent).contours_geojson(slide_id)

    def models(self, slide: SlideFile) -> tuple[Path, ...]:
        """Return the models that choose for a slide; `SlideError` when all may have seen it and that is not allowed."""
        unbiased = self.run.unbiased(slide.slide_id)
        if unbiased:
            return unbiased
        if not self.allow_seen:
            raise SlideError(slide.path, f"{self._objection(slide.slide_id)}, or pass --allow-seen", code="seen")
        return tuple(model.folder for model in self.run.models)

    def _objection(self, slide_id: str) -> str:
        if self.run.is_unknown(slide_id):
            return f"{self.run.root} does not state which slides its model was trained on; train it again"
        return f"every model of {self.run.root} has seen the slide or its patient; select with a cross-validation run"

    def warn_of_seen(self, slides: Sequence[SlideFile]) -> None:
        """Warn of the slides on which the second stage will look better than it is."""
        biased = [slide.slide_id for slide in slides if not self.run.unbiased(slide.slide_id)]
        if biased and self.allow_seen:
            logger.warning(
                "the tiles of %d of %d slides are chosen by models that have seen them (%s); results of a "
                "second stage on these slides are biased, and their files are marked",
                len(biased), len(slides), shown(biased),
            )  # fmt: skip

    def provenance(self, slide: SlideFile) -> dict[str, Any]:
        """Return what the choice rests on, beside the slide."""
        footer = read_footer(self.stage_one(slide.slide_id))
        known = "unknown" if self.run.is_unknown(slide.slide_id) else "no"
        return {
            "rule": RULE,
            **self.selection.model_dump(mode="json"),
            "models": sorted(self.ids[folder] for folder in self.models(slide)),
            "out_of_fold": "yes" if self.run.unbiased(slide.slide_id) else known,
            "features": footer.options_hash,
        }

    def options_hash(self, slide: SlideFile) -> str:
        """16 hexadecimal digits that change with anything that decides the rows."""
        outline = self.outline(slide.slide_id)
        return fingerprint(
            "select",
            slide=slide.version(),
            slide_mpp=slide.reading,
            tiling=self.tiling,
            rule=self.provenance(slide),
            features=file_fingerprint(self.stage_one(slide.slide_id)),
            outline=outline.read_bytes() if outline.is_file() else None,
        )


def make_plan(
    job: JobFolder, run: Path, tiling: Tiling, selection: Selection, *, features: Path | None, allow_seen: bool
) -> SelectionPlan:
    """Check everything that the slides have in common; see `tile_selected` for the errors."""
    models = Run.open(run)
    cards = {model.folder: load_card(model.folder) for model in models.models}
    card = next(iter(cards.values()))
    first = _first_tiling(run, card)
    tile_ratio(first, tiling)
    model, _ = load_model(models.models[0].folder)
    if not issubclass(model.output_type, AttentionOutput):
        raise ConfigError(
            f"{run}: {card.recipe.aggregator.name} has no attention, so it cannot choose tiles; train the first "
            "stage with an aggregator that has attention (abmil, the recipe two_stage ...)"
        )
    folder = _stage_one_features(job, card) if features is None else features
    some = next(iter(find_bags(folder).values()))
    card.features.require_match(read_spec(some), some)
    ids = {path: each.model_id for path, each in cards.items()}
    return SelectionPlan(job, models, ids, card.features, tiling, selection, folder, allow_seen)


def _first_tiling(run: Path, card: ModelCard) -> Tiling:
    spec = card.features
    if spec.mpp is None or spec.patch_size is None:
        raise ConfigError(
            f"{run}: was not trained on slide tiles, so it cannot choose tiles; pass a run trained on slides"
        )
    return Tiling(mpp=spec.mpp, patch_size=spec.patch_size)


def _stage_one_features(job: JobFolder, card: ModelCard) -> Path:
    spec = card.features
    fitting = []
    for folder in sorted(job.root.glob(f"*/features_{folder_name(spec.encoder)}")):
        some = next(iter(list_files(folder, ".h5").values()), None)
        if some is not None and _fits(card, some):
            fitting.append(folder)
    if len(fitting) != 1:
        found = f"has {len(fitting)} folders" if fitting else "has no folder"
        raise ConfigError(
            f"{job.root}: {found} of {spec.encoder} features of {spec.patch_size} px at {spec.mpp:g} µm/px, which the "
            f"first stage was trained on{': ' + shown([str(path) for path in fitting]) if fitting else ''}; name one "
            "with --features"
        )
    return fitting[0]


def _fits(card: ModelCard, path: Path) -> bool:
    try:
        card.features.require_match(read_spec(path), path)
    except EosinError:
        return False
    return True


def _slide_id(slide: SlideFile) -> str:
    return slide.slide_id


def _is_selected(plan: SelectionPlan, slide: SlideFile) -> bool:
    try:
        return read_coords_footer(plan.patches(slide.slide_id)).options_hash == plan.options_hash(slide)
    except (EosinError, OSError):
        return False


def _select(plan: SelectionPlan, item: SlideFile) -> Outcome:
    bag = _stage_one_bag(plan, item)
    models = [_model(folder, plan.ids[folder]) for folder in plan.models(item)]
    parents = choose_tiles(bag, models, plan.selection)
    with item.open() as slide:
        _require_same_slide(parents, slide)
        grid = child_grid(parents, plan.tiling)
        share = _tissue(plan, item, slide).fraction(grid.boxes_px0())
        grid = grid.select((share >= plan.tiling.min_tissue - 1e-9) & (share > 0))
        write_grid(
            plan.patches(item.slide_id),
            grid,
            slide_id=item.slide_id,
            mpp_source=slide.mpp_source,
            fingerprint=file_fingerprint(item.path),
            options_hash=plan.options_hash(item),
            selection=json.dumps(plan.provenance(item) | {"chosen": parents.n_tiles, "of": bag.n_instances}),
        )
    if not bag.n_instances:
        return Outcome("empty", "the first stage has no tiles of this slide")
    note = f"{parents.n_tiles} of {bag.n_instances} tiles chosen, {grid.n_tiles} tiles for the second stage"
    return Outcome("ok" if grid.n_tiles else "empty", note)


def _require_same_slide(grid: TileGrid, slide: Slide) -> None:
    if other := slide.other_image(grid.image):
        raise SlideError(slide.path, f"its features of the first stage are of {other}", code="changed")
    if abs(slide.mpp / grid.slide_mpp - 1) > MPP_TOLERANCE or slide.size_px0 != grid.slide_size_px0:
        raise SlideError(
            slide.path,
            f"has {slide.mpp:.4g} µm/px, its features of the first stage were made with {grid.slide_mpp:.4g}; extract "
            "them again, or pass the same --slide-mpp",
            code="changed",
        )


def _stage_one_bag(plan: SelectionPlan, item: SlideFile) -> FeatureBag:
    path = plan.stage_one(item.slide_id)
    plan.models(item)
    if not path.is_file():
        raise SlideError(
            item.path, f"has no features of the first stage ({path}); extract them first", code="no-features"
        )
    bag = read_bag(path)
    plan.spec.require_match(bag.spec, path)
    if bag.grid is None:
        raise FeatureFileError(path, "has no tile coordinates; extract the slide again")
    item.stage()
    if read_footer(path).input_fingerprint != file_fingerprint(item.path):
        raise SlideError(item.path, "has changed since the first stage read it; extract it again", code="changed")
    return bag


@lru_cache(maxsize=MODELS_KEPT)
def _model(folder: Path, _model_id: str) -> Aggregator:
    return load_model(folder)[0]


def choose_tiles(bag: FeatureBag, models: Sequence[Aggregator], selection: Selection) -> TileGrid:
    """Return the tiles of a slide that the mean attention of some models chooses.

    Parameters
    ----------
    bag : FeatureBag
        With a grid.
    models : sequence of Aggregator
        Each with an `AttentionOutput`; branches count alike.
    selection : Selection
    """
    if bag.grid is None:
        raise ConfigError(
            f"the features of {bag.slide_id} have no tile coordinates, so tiles cannot be "
            "chosen; extract the slide again"
        )
    if not bag.n_instances:
        return bag.grid
    weights: NDArray[np.float64] = np.mean([attention_weights(model, bag).mean(1) for model in models], axis=0)
    rows = select_tiles(
        weights,
        bag.features,
        budget=selection.budget,
        clusters=selection.clusters,
        components=selection.components,
        seed=selection.seed,
    )
    return bag.grid.select(rows)


def _tissue(plan: SelectionPlan, item: SlideFile, slide: Slide) -> TissueMask:
    outline = plan.outline(item.slide_id)
    if not outline.is_file():
        return find_tissue(slide)
    return tissue_from_outline(slide, read_outline(outline, qupath_origin_px0=qupath_origin(slide.bounds_px0)))
