"""`eosin tile`: slides → tissue, contours, tile coordinates."""

from eosin.cli._arguments import (
    Job,
    Magnification,
    MinTissue,
    Mpp,
    Overlap,
    PatchSize,
    Shard,
    SlideMpp,
    Slides,
    Workers,
    shard_numbers,
    slide_mpp_source,
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
    slide_mpp: SlideMpp = None,
    workers: Workers = 0,
    shard: Shard = "0/1",
    settings: Settings,
) -> Done:
    """Find the tissue of slides and lay the grid of tiles over it."""
    from eosin.wsi.grid import Tiling
    from eosin.wsi.job import JobFolder, tile_slides
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
    with progress("tile", len(files[index::count])) as advance:
        report = tile_slides(
            files,
            JobFolder(job),
            tiling,
            tissue=tissue,
            workers=workers,
            shard=(index, count),
            progress=advance,
        )
    return Done([job / tiling.folder], report)
