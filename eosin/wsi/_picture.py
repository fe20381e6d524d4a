"""Pictures for a person to check a slide by."""

import io
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw
from PIL.PngImagePlugin import PngInfo
from shapely import MultiPolygon

from eosin._files import write_bytes
from eosin.errors import OutputError

OUTLINE_COLOUR = (0, 200, 0)
HOLE_COLOUR = (0, 80, 255)
JPEG_QUALITY = 85
FORMATS = {".jpg": "JPEG", ".png": "PNG"}
MARK = "written by eosin"
"""Marks every picture that eosin writes beside slides, so that none is read as a slide in the next run."""

MARKED_SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff")
HEAD_BYTES = 2**16


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


def is_written_by_eosin(path: Path) -> bool:
    """Return whether a file is a picture or a heat map that eosin wrote; a file that cannot be read is not."""
    if not path.name.lower().endswith(MARKED_SUFFIXES):
        return False
    try:
        with path.open("rb") as file:
            return MARK.encode() in file.read(HEAD_BYTES)
    except OSError:
        return False


def write_picture(path: Path, picture: Image.Image, **options: Any) -> None:
    """Write a picture in the format of its name, whole or not at all.

    It is encoded in memory and decoded again: Pillow's encoders take a short write to a full disk for a success.

    Parameters
    ----------
    path : Path
        ``.jpg`` or ``.png``.
    picture : Image
    **options
        Of the encoder, see Pillow.

    Raises
    ------
    OutputError
        If it cannot be written, or does not decode to a picture of this size.
    """
    buffer = io.BytesIO()
    if path.suffix == ".png":
        facts = options.setdefault("pnginfo", PngInfo())
        facts.add_text("Software", MARK)
    else:
        options["comment"] = MARK
    picture.save(buffer, FORMATS[path.suffix], **options)
    with Image.open(io.BytesIO(buffer.getvalue())) as again:
        again.load()
        if again.size != picture.size:
            raise OutputError(path, f"was encoded as {again.size}, not {picture.size}; report this as a fault")
    write_bytes(path, buffer.getvalue())


def write_jpeg(path: Path, picture: Image.Image) -> None:
    """Write a JPEG, whole or not at all."""
    write_picture(path, picture, quality=JPEG_QUALITY)
