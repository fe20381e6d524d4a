"""Tissue and tiles as pictures, to settle the options of a cohort before any coordinates are written."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from PIL import Image, ImageDraw

from eosin._batch import Outcome, run_batch
from eosin._records import Record, Report
from eosin.wsi._grid import TileGrid, Tiling
from eosin.wsi._job import JobFolder, TilePlan, TissueTiles, all_of
from eosin.wsi._overview import make_thumbnail
from eosin.wsi._picture import draw_outline, write_jpeg
from eosin.wsi._slide_file import SlideFile

TILE_COLOUR = (70, 70, 70)
MIN_TILE_SIDE = 4.0


def preview_slides(
    slides: Sequence[SlideFile],
    job: JobFolder,
    tiles: TissueTiles | Tiling | None = None,
    *,
    workers: int = 0,
    shard: tuple[int, int] = (0, 1),
    timeout_s: float | None = None,
    progress: Callable[[Record], None] | None = None,
) -> Report:
    """Draw what `eosin.wsi._job.tile_slides` would do with the same arguments: ``JOB/previews/<slide>.jpg``.

    Nothing else is written, and every call draws again.

    Parameters
    ----------
    slides, job, tiles, workers, shard, timeout_s, progress
        As of `eosin.wsi._job.tile_slides`.

    Returns
    -------
    Report
        One record per slide.

    Raises
    ------
    ConfigError
        If there is no folder of contours.
    OutputError
        If the pictures cannot be written.
    """
    plan = all_of(tiles).plan(slides, job)
    return run_batch(
        slides,
        partial(_preview, plan),
        key=_slide_id,
        stage="preview",
        workers=workers,
        shard=shard,
        timeout_s=timeout_s,
        progress=progress,
    )


def _slide_id(slide: SlideFile) -> str:
    return slide.slide_id


def _preview(plan: TilePlan, item: SlideFile) -> Outcome:
    picture, outcome = _draw(plan, item)
    write_jpeg(plan.job.preview(item.slide_id), picture)
    return outcome


def _draw(plan: TilePlan, item: SlideFile) -> tuple[Image.Image, Outcome]:
    with plan.open(item) as slide:
        tiled = plan.lay_tiles(item, slide)
        thumbnail = make_thumbnail(slide, tiled.overview.rgb)
        outlined = draw_outline(thumbnail, tiled.mask.contours(), slide.size_px0)
        return draw_grid(outlined, tiled.grid), tiled.outcome


def draw_grid(thumbnail: Image.Image, grid: TileGrid) -> Image.Image:
    """Return the thumbnail with the outline of every tile; as it is when tiles would be smaller than 4 px."""
    picture = thumbnail.copy()
    scale = picture.width / grid.slide_size_px0[0]
    if grid.tile_px0 * scale < MIN_TILE_SIDE:
        return picture
    draw = ImageDraw.Draw(picture)
    for box in (grid.boxes_px0() * scale).tolist():
        draw.rectangle(box, outline=TILE_COLOUR)
    return picture


def preview_slide(item: SlideFile, tiles: TissueTiles | Tiling | None = None) -> Image.Image:
    """Return the picture of a slide with the outline of its tissue and its tiles, without writing anything.

    Parameters
    ----------
    item : SlideFile
        The slide.
    tiles : TissueTiles or Tiling, optional
        As of `eosin.wsi._job.tile_slides`.

    Raises
    ------
    SlideError
        If the slide cannot be opened or tiled.
    """
    return _draw(all_of(tiles).plan([item], JobFolder(Path())), item)[0]
