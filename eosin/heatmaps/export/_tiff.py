"""Heat maps as pyramid TIFFs: colours that any slide viewer opens, or the scores themselves as float32.

Colours follow what OpenSlide's generic TIFF reader, QuPath and Bio-Formats accept: RGB of 8 bits in tiles, deflate,
the resolution in pixels per centimetre, and each further level a reduced image in the main chain of directories.
Every level is painted from the tiles themselves, strip by strip, so memory does not grow with the picture.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
import tifffile
from numpy.typing import NDArray

from eosin._files import write_file
from eosin.errors import ConfigError
from eosin.heatmaps._colour import ColourScale, scale_of
from eosin.heatmaps._heatmap import Heatmap, Window, raster_shape
from eosin.wsi._picture import MARK

SIDE_PX = 256
TILE_SHOWN_PX = 16
CENTIMETRE_UM = 1e4
CLASSIC_BYTES = 2**32 - 2**25
MAX_PIXELS = 10**10


def write_tiff(
    path: Path,
    heatmap: Heatmap,
    *,
    content: Literal["colours", "scores"] = "colours",
    mpp: float | None = None,
    window_px0: Window | None = None,
    scale: ColourScale | None = None,
) -> None:
    """Write a map as a tiled pyramid with its resolution.

    Parameters
    ----------
    path : Path
    heatmap : Heatmap
    content : {"colours", "scores"}
        RGB, white where no tile lies, for every viewer including OpenSlide; or float32 with NaN where no tile lies,
        for QuPath, Bio-Formats and tifffile (OpenSlide shows no floats).
    mpp : float, optional
        Of the finest level; by default the coarsest power-of-two multiple of the slide's that still shows the step
        from tile to tile with 16 pixels.
    window_px0 : (x, y, w, h), optional
        The part of the slide to show: pass the scanned box when the map will lie over a slide in QuPath, which shows
        that box as the image.
    scale : ColourScale, optional
        `scale_of(heatmap)` unless given.

    Raises
    ------
    ConfigError
        If `mpp` would give more than 10¹⁰ pixels.
    """
    finest = mpp or default_mpp(heatmap)
    height, width = raster_shape(heatmap.grid, finest, window_px0)
    if height * width > MAX_PIXELS:
        raise ConfigError(
            f"a heat map at {finest:g} µm/px has {width} x {height} pixels, which is too large; choose a larger mpp"
        )
    pixels = _Pixels((3,), "rgb", 255, (scale or scale_of(heatmap)).rgb) if content == "colours" else SCORES
    write_file(path, lambda file: _write_pyramid(file, heatmap, finest, window_px0, pixels))


def default_mpp(heatmap: Heatmap) -> float:
    """Return the resolution that shows every tile without storing each of its pixels."""
    grid = heatmap.grid
    step_px0 = (grid.tiling.patch_size - grid.tiling.overlap) * grid.delivered_mpp / grid.slide_mpp
    return float(grid.slide_mpp * 2 ** max(0, np.floor(np.log2(step_px0 / TILE_SHOWN_PX))))


def _write_pyramid(
    file: BinaryIO, heatmap: Heatmap, finest: float, window_px0: Window | None, pixels: "_Pixels"
) -> None:
    height, width = raster_shape(heatmap.grid, finest, window_px0)
    # a classic file must have room for the directories, and for tiles that deflate does not shrink
    with tifffile.TiffWriter(file, bigtiff=height * width * 4 > CLASSIC_BYTES) as tiff:
        for level, mpp in enumerate(_level_mpps(heatmap, finest, window_px0)):
            tiff.write(
                _tiles(heatmap, mpp, window_px0, pixels),
                shape=(*raster_shape(heatmap.grid, mpp, window_px0), *pixels.channels),
                dtype=np.float32 if pixels is SCORES else np.uint8,
                photometric=pixels.photometric,
                tile=(SIDE_PX, SIDE_PX),
                compression="deflate",
                resolution=(CENTIMETRE_UM / mpp, CENTIMETRE_UM / mpp),
                resolutionunit="CENTIMETER",
                subfiletype=int(level > 0),
                description=None if level else heatmap.caption,
                software=MARK,
                # else tifffile writes a second description, its own
                metadata=None,
            )


def _level_mpps(heatmap: Heatmap, finest: float, window_px0: Window | None) -> list[float]:
    mpps = [finest]
    while max(raster_shape(heatmap.grid, mpps[-1], window_px0)) > SIDE_PX:
        mpps.append(mpps[-1] * 2)
    return mpps


@dataclass(frozen=True)
class _Pixels:
    """How scores become what a pixel stores: channels beside it, what blank is, and the conversion of a strip."""

    channels: tuple[int, ...]
    photometric: str
    blank: float
    convert: Callable[[NDArray[np.float32]], NDArray[Any]]


SCORES = _Pixels((), "minisblack", np.nan, np.asarray)


def _tiles(heatmap: Heatmap, mpp: float, window_px0: Window | None, pixels: _Pixels) -> Iterator[NDArray[Any]]:
    for plane in heatmap.raster_strips(mpp, rows=SIDE_PX, window_px0=window_px0):
        strip = pixels.convert(plane)
        for left in range(0, strip.shape[1], SIDE_PX):
            part = strip[:, left : left + SIDE_PX]
            tile = np.full((SIDE_PX, SIDE_PX, *pixels.channels), pixels.blank, dtype=strip.dtype)
            tile[: part.shape[0], : part.shape[1]] = part
            yield tile
