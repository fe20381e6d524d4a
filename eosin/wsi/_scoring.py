"""The quality of tiles: ink, folds and glass from the overview, blur from the tiles themselves.

At the overview's 8 µm/px ink, folds and glass are seen as well as anywhere, and 200,000 tiles cost nothing. Blur is
not: what a lens loses lies below 4 µm. It is measured at 1 µm/px, where one sixteenth of the pixels of a slide of
0.25 µm/px are read, most scanners store a level, and blur by 1 µm and more differs from sharp tissue (docs/slides.md).
"""

import math

import numpy as np
from numpy.typing import NDArray

from eosin.wsi._grid import TileGrid, Tiling
from eosin.wsi._morphology import Mask, drop_small, window_of, window_sums
from eosin.wsi._overview import Overview
from eosin.wsi._quality import TileQuality
from eosin.wsi._slide import Slide
from eosin.wsi._stain import sample_step, total_density
from eosin.wsi._tiles import iterate_tiles
from eosin.wsi._tissue import TissueMask

BLUR_MPP = 1.0
COARSEST_BLUR_MPP = 1.3
LAGS_PX = ((1, 4), (2, 8))
NOISE = 4.0  # variance of the difference of two equal pixels, in grey levels
BATCH = 64
AT_ONCE_PX = 2**17  # of tiles whose differences stay in the processor's cache
FOLD_RATIO = 1.7
FOLD_MIN_DENSITY = 0.8
FOLD_WINDOW_UM = 40.0
FOLD_MIN_UM2 = 2_500.0
_UNIT = 100  # of 8-bit optical density: at most 0.85 of each channel


def score_tiles(
    slide: Slide,
    grid: TileGrid,
    mask: TissueMask,
    overview: Overview,
    *,
    tissue: NDArray[np.float64] | None = None,
    with_blur: bool,
    threads: int = 2,
) -> TileQuality:
    """Return the quality of every tile.

    Parameters
    ----------
    slide : Slide
        Open; its pixels are read only for the blur.
    grid : TileGrid
        The tiles.
    mask : TissueMask
        Tissue and ink of the slide.
    overview : Overview
        The slide at the mask's resolution, or at a whole multiple of its mpp.
    tissue : (n,) float64, optional
        Share of each tile that is tissue, when it is known.
    with_blur : bool
        Whether blur is measured; otherwise it is NaN.
    threads : int
        Threads that read tiles.

    Raises
    ------
    CorruptSlideError
        If tiles cannot be decoded.
    """
    at, side = grid.origins_px0, grid.tile_px0
    none = np.zeros(grid.n_tiles, np.float32)
    folds = _folds_of(mask, overview)
    return TileQuality(
        blur=_measure_blur(slide, grid, threads) if with_blur else np.full(grid.n_tiles, np.nan, np.float32),
        pen=none
        if mask.pen is None or not mask.pen.any()
        else mask.like(mask.pen).share_of(at, side).astype(np.float32),
        fold=folds.share_of(at, side).astype(np.float32) if folds.mask.any() else none,
        background=(1 - (mask.share_of(at, side) if tissue is None else tissue)).astype(np.float32),
    )


def _folds_of(mask: TissueMask, overview: Overview) -> TissueMask:
    """Return the folds on the lattice of the overview."""
    ratio = round(mask.mask.shape[0] / overview.rgb.shape[0])
    width, height = (side * ratio for side in mask.px0_per_cell)
    dark = find_folds(overview, mask.mask[::ratio, ::ratio])
    return TissueMask(dark, (width, height), mask.slide_size_px0, mask.slide_mpp)


def find_folds(overview: Overview, tissue: Mask) -> Mask:
    """Return where a picture is much darker than its tissue: folds, dark dirt, rims of air bubbles.

    The optical density, summed over the channels and averaged over 40 µm, is at least 1.7 times the median of the
    tissue, and at least 0.8. Folds are two or more layers, so most of a fold is found; tissue that is much denser than
    the rest of its slide (follicles, blood) is found, too.

    Parameters
    ----------
    overview : Overview
    tissue : (h, w) bool
    """
    folds = np.zeros(tissue.shape, bool)
    if not tissue.any():
        return folds
    side = max(1, round(FOLD_WINDOW_UM / overview.mpp))
    place = window_of(tissue, side)
    density = total_density(overview.light[:, *place], _UNIT)
    step = sample_step(density.shape)
    some = np.bincount(density[::step, ::step][tissue[place][::step, ::step]], minlength=256).cumsum()
    median = int(np.searchsorted(some, some[-1] / 2))
    limit = min(max(FOLD_MIN_DENSITY * _UNIT, FOLD_RATIO * median), 250)
    folds[place] = drop_small(
        window_sums(density, side) >= limit * side**2, FOLD_MIN_UM2 / overview.mpp**2, keep_largest=False
    )
    return folds


def _measure_blur(slide: Slide, grid: TileGrid, threads: int) -> NDArray[np.float32]:
    blur = np.full(grid.n_tiles, np.nan, np.float32)
    mpp = max(BLUR_MPP, slide.mpp)
    side = math.floor(grid.tile_px0 * slide.mpp / mpp + 1e-6)
    if mpp > COARSEST_BLUR_MPP or side < 4 * LAGS_PX[-1][-1]:
        return blur
    coarse = TileGrid(
        grid.origins_px0,
        grid.tile_px0,
        Tiling(mpp=mpp, patch_size=side, tolerance=0.05),
        grid.slide_size_px0,
        slide.mpp,
    )
    for tiles, index in iterate_tiles(slide, coarse, batch_size=BATCH, threads=threads):
        blur[index] = blur_of(tiles)
    return blur


def blur_of(tiles: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Return how blurred tiles of about 1 µm/px are: 0 as sharp as noise, 1 without any fine detail.

    In sharp tissue neighbouring pixels differ nearly as much as pixels four times as far apart; in a blurred picture
    differences grow with the distance. With D(k) the mean squared difference of green at distance k, plus what noise
    makes, blur is (1 - √(D(k) / D(4k))) / (1 - 1/4), the larger of k = 1 and 2. It does not depend on contrast, and
    tiles without structure count as sharp.

    Parameters
    ----------
    tiles : (n, h, w, 3) uint8

    Returns
    -------
    (n,) float32
    """
    step = max(1, AT_ONCE_PX // (tiles.shape[1] * tiles.shape[2]))
    some = [_blur_of_few(tiles[start : start + step]) for start in range(0, len(tiles), step)]
    return np.concatenate([np.zeros(0, np.float32), *some])


def _blur_of_few(tiles: NDArray[np.uint8]) -> NDArray[np.float32]:
    green = tiles[..., 1].astype(np.float32)
    found = np.zeros(len(tiles), np.float32)
    for near, far in LAGS_PX:
        ratio = np.sqrt((_difference(green, near) + NOISE) / (_difference(green, far) + NOISE))
        found = np.maximum(found, (1 - ratio) / (1 - near / far))
    return np.clip(found, 0, 1)


def _difference(green: NDArray[np.float32], lag: int) -> NDArray[np.float32]:
    down, across = green[:, lag:] - green[:, :-lag], green[:, :, lag:] - green[:, :, :-lag]
    return np.asarray(np.square(down).mean(axis=(1, 2)) + np.square(across).mean(axis=(1, 2)))
