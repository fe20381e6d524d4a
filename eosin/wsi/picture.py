"""Pictures for a person to check a slide by."""

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from shapely import MultiPolygon

from eosin.files import write_file
from eosin.wsi.grid import TileGrid

OUTLINE_COLOUR = (0, 200, 0)
HOLE_COLOUR = (0, 80, 255)
TILE_COLOUR = (70, 70, 70)
MIN_TILE_SIDE = 4.0
JPEG_QUALITY = 85


def draw_outline(thumbnail: Image.Image, outline: MultiPolygon, slide_size_px0: tuple[int, int]) -> Image.Image:
    """Return the thumbnail with the outline of the tissue (green) and of its holes (blue).

    Parameters
    ----------
    thumbnail : Image
        The whole slide.
    outline : MultiPolygon
        Level-0 pixels.
    slide_size_px0 : tuple of int
        Width and height of the slide.
    """
    picture = thumbnail.copy()
    draw = ImageDraw.Draw(picture)
    scale = np.divide(picture.size, slide_size_px0)
    width = max(1, max(picture.size) // 400)
    for polygon in outline.geoms:
        rings = [(polygon.exterior, OUTLINE_COLOUR), *((hole, HOLE_COLOUR) for hole in polygon.interiors)]
        for ring, colour in rings:
            points = np.asarray(ring.coords)[:, :2] * scale
            draw.line([(x, y) for x, y in points.tolist()], fill=colour, width=width)
    return picture


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


def write_jpeg(path: Path, picture: Image.Image) -> None:
    """Write a JPEG; it is whole or it is not there."""
    write_file(path, lambda temporary: picture.save(temporary, "JPEG", quality=JPEG_QUALITY))
