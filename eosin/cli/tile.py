"""`eosin tile`: slides → tissue, contours, tile coordinates."""

from eosin.cli._arguments import (
    Contours,
    Job,
    Magnification,
    MinTissue,
    Mpp,
    Overlap,
    Overrides,
    PatchSize,
    Preview,
    Shard,
    SlideMpp,
    Slides,
    Timeout,
    Workers,
    shard_numbers,
    slide_mpp_source,
    slide_timeout,
    tile_mpp,
)
from eosin.cli._common import Done, Settings, command, progress


@command("tiling", "tissue")
def tile(
    slides: Slides,
    *,
    job: Job,
    mpp: Mpp = None,
    magnification: Magnification = None,
    patch_size: PatchSize = None,
    overlap: Overlap = None,
    min_tissue: MinTissue = None,
    contours: Contours = None,
    overrides: Overrides = None,
    slide_mpp: SlideMpp = None,
    preview: Preview = False,
    workers: Workers = 0,
    timeout: Timeout = None,
    shard: Shard = "0/1",
    settings: Settings,
) -> Done:
    """Find the tissue of slides and lay the grid of tiles over it."""
    from eosin.wsi.grid import Tiling
    from eosin.wsi.job import JobFolder, read_overrides, tile_slides
    from eosin.wsi.preview import preview_slides
    from eosin.wsi.slide import find_slides
    from eosin.wsi.tissue import TissueOptions

    tiling = settings.parse(
        "tiling",
        Tiling,
        mpp=tile_mpp(mpp, magnification),
        patch_size=patch_size,
        overlap=overlap,
        min_tissue=min_tissue,
    )
    tissue = settings.parse("tissue", TissueOptions)
    files = find_slides(slides, slide_mpp=slide_mpp_source(slide_mpp))
    index, count = shard_numbers(shard)
    treat = preview_slides if preview else tile_slides
    with progress("tile", len(files[index::count])) as advance:
        report = treat(
            files,
            JobFolder(job),
            tiling,
            tissue=tissue,
            overrides=read_overrides(overrides, tissue) if overrides else None,
            contours=contours,
            workers=workers,
            shard=(index, count),
            timeout_s=slide_timeout(timeout, workers),
            progress=advance,
        )
    return Done([job / ("previews" if preview else tiling.folder)], report)
