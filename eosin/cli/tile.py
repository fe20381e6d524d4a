"""`eosin tile`: slides → tissue, contours, tile coordinates; or the tiles that a first model chooses for a second."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from eosin.cli._arguments import (
    Contours,
    Edges,
    Icc,
    Job,
    Magnification,
    MaxBlur,
    MaxFold,
    MaxPen,
    MinTissue,
    Mpp,
    Overlap,
    Overrides,
    PatchSize,
    Plane,
    Preview,
    Scene,
    Shard,
    SlideMpp,
    Slides,
    Timeout,
    TissueWeights,
    Workers,
    scene_number,
    shard_numbers,
    slide_mpp_source,
    slide_timeout,
    tile_mpp,
)
from eosin.cli._common import Done, command
from eosin.cli._progress import progress
from eosin.cli._settings import Settings
from eosin.errors import ConfigError

if TYPE_CHECKING:
    from eosin._records import Report
    from eosin.wsi._grid import Tiling
    from eosin.wsi._slide_file import SlideFile

STAGES = "Two stages"


@command(
    "tiling", "tissue", "quality", "selection",
    rare=("scene", "plane", "magnification", "overlap", "min_tissue", "icc", "tissue_weights", "overrides",
          "max_blur", "max_pen", "max_fold", "edges", "from_", "budget", "features", "allow_seen", "spread",
          "timeout", "shard"),
    bare="slides", cluster="job",
)  # fmt: skip
def tile(
    *,
    slides: Slides,
    job: Job,
    mpp: Mpp = None,
    magnification: Magnification = None,
    patch_size: PatchSize = None,
    overlap: Overlap = None,
    min_tissue: MinTissue = None,
    edges: Edges = None,
    icc: Icc = False,
    contours: Contours = None,
    tissue_weights: TissueWeights = None,
    overrides: Overrides = None,
    max_blur: MaxBlur = None,
    max_pen: MaxPen = None,
    max_fold: MaxFold = None,
    slide_mpp: SlideMpp = None,
    scene: Scene = None,
    plane: Plane = None,
    preview: Preview = False,
    from_: Annotated[
        Path | None,
        typer.Option(
            "--from",
            metavar="RUN",
            help="Choose tiles by the attention of models trained at a coarser mpp: folder of `eosin crossval`.",
            rich_help_panel=STAGES,
        ),
    ] = None,
    budget: Annotated[
        int | None,
        typer.Option(
            help="With --from: largest number of tiles per slide that the models choose.",
            show_default="64",
            rich_help_panel=STAGES,
        ),
    ] = None,
    features: Annotated[
        Path | None,
        typer.Option(
            help="With --from: features of these slides for the models, if they are not in the job.",
            rich_help_panel=STAGES,
        ),
    ] = None,
    allow_seen: Annotated[
        bool,
        typer.Option(
            "--allow-seen", help="With --from: allow models that were trained on the slide.", rich_help_panel=STAGES
        ),
    ] = False,
    spread: Annotated[
        bool,
        typer.Option("--spread", help="Spread the job's files over 256 folders each; new jobs of 100,000 slides are."),
    ] = False,
    workers: Workers = 0,
    timeout: Timeout = None,
    shard: Shard = "0/1",
    settings: Settings,
) -> Done:
    """Find the tissue on slides and cut it into tiles. With --from, keep the tiles that a first model attends to."""
    from eosin.wsi._grid import Tiling
    from eosin.wsi._job import JobFolder, TissueTiles, read_overrides, tile_slides
    from eosin.wsi._preview import preview_slides
    from eosin.wsi._quality import QualityLimits
    from eosin.wsi._slide_file import find_slides
    from eosin.wsi._tissue import TissueOptions

    tiling = settings.parse(
        "tiling",
        Tiling,
        mpp=tile_mpp(mpp, magnification),
        patch_size=patch_size,
        overlap=overlap,
        min_tissue=min_tissue,
        edges=edges,
        icc=icc or None,
    )
    tissue = settings.parse("tissue", TissueOptions)
    quality = settings.parse("quality", QualityLimits, max_blur=max_blur, max_pen=max_pen, max_fold=max_fold)
    files = find_slides(
        slides,
        slide_mpp=slide_mpp_source(slide_mpp),
        scene=scene_number(scene),
        plane=plane,
        unread=from_ is None and not preview,
    )
    index, count = shard_numbers(shard)
    if from_ is not None:
        wrong = {
            "preview": preview,
            "contours": contours,
            "tissue-weights": tissue_weights,
            "overrides": overrides,
            "tissue": settings.group("tissue"),
        }
        _refuse_together(**wrong, quality=quality != QualityLimits())
        return _tile_selected(
            files,
            job,
            from_,
            tiling,
            settings,
            budget=budget,
            features=features,
            allow_seen=allow_seen,
            workers=workers,
            shard=(index, count),
            timeout_s=slide_timeout(timeout, workers),
        )
    if budget is not None or features is not None or allow_seen or settings.group("selection"):
        raise ConfigError(
            "--budget, --features, --allow-seen and selection need --from RUN; add --from RUN or remove them"
        )
    before = None
    if tissue_weights is not None:
        if contours is not None:
            raise ConfigError("--contours and --tissue-weights both say where tissue is; remove one of them")
        from eosin.features._tissue_model import FOLDER

        contours = job / FOLDER
        files, before = _outlined(files[index::count], tissue_weights, contours, job)
        index, count = 0, 1
    if spread:
        JobFolder(job).spread()
    treat = preview_slides if preview else tile_slides
    with progress("tile", len(files[index::count])) as advance:
        report = treat(
            files,
            JobFolder(job),
            TissueTiles(tiling, tissue, quality, read_overrides(overrides, tissue) if overrides else {}, contours),
            workers=workers,
            shard=(index, count),
            timeout_s=slide_timeout(timeout, workers),
            progress=advance,
        )
    report = report if before is None else before.then(report)
    return Done([job / ("previews" if preview else tiling.folder)], report)


def _outlined(files: "Sequence[SlideFile]", weights: Path, folder: Path, job: Path) -> "tuple[list[SlideFile], Report]":
    """Outline slides by a network; return those that can be tiled, and what became of all."""
    from eosin._devices import choose_device
    from eosin.features._tissue_model import load_tissue_model, outline_slides
    from eosin.wsi._job import JobFolder

    mine = [file for file in files if not file.unread]
    model = load_tissue_model(weights, choose_device())
    with progress("tissue", len(mine)) as advance:
        report = outline_slides(mine, model, folder, run_json=JobFolder(job).run_json, progress=advance)
    lost = {record.slide_id for record in report.failed}
    return [file for file in files if file.slide_id not in lost], report


def _refuse_together(**given: object) -> None:
    """Refuse options that say where tissue is: a second stage takes the outlines of the first."""
    wrong = [f"--{name}" for name, value in given.items() if value]
    if wrong:
        raise ConfigError(
            f"{', '.join(wrong)}: not possible with --from RUN, which reuses the first stage's tissue; remove it"
        )


def _tile_selected(
    files: "list[SlideFile]",
    job: Path,
    run: Path,
    tiling: "Tiling",
    settings: Settings,
    *,
    budget: int | None,
    features: Path | None,
    allow_seen: bool,
    workers: int,
    shard: tuple[int, int],
    timeout_s: float | None,
) -> Done:
    from eosin.pipeline._selection import Selection, tile_selected
    from eosin.wsi._job import JobFolder

    selection = settings.parse("selection", Selection, budget=budget)
    with progress("select", len(files[shard[0] :: shard[1]])) as advance:
        report = tile_selected(
            files,
            JobFolder(job),
            run,
            tiling,
            selection=selection,
            features=features,
            allow_seen=allow_seen,
            workers=workers,
            shard=shard,
            timeout_s=timeout_s,
            progress=advance,
        )
    return Done([job / selection.folder(tiling)], report)
