"""Colours of a bright-field overview: glass, stain, marker ink."""

from collections.abc import Callable
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from skimage.filters import threshold_otsu

from eosin.wsi.morphology import Mask, drop_small, grow

DARK_LEVEL = 60
BRIGHT_LEVEL = 140
STAIN_RANGE = (0.022, 0.04)
SAMPLE_PX = 500_000
GLASS_MIN_SHARE = 0.003
GLASS_LEVELS = (120, 255)
DEFAULT_GLASS = (245.0, 245.0, 245.0)
PEN_SHARE_LIMIT = 0.67
PEN_MIN_UM2 = 10_000.0
PEN_GROW_UM = 24.0
RIM_UM = 40.0
ON_GLASS_SHARE = 0.65
FLAT_UM = 40.0
FLAT_MAX_MPP = 12.0
FLAT_VARIATION = 0.02

Density = NDArray[np.float32]  # (3, h, w): optical density of red, green and blue
Numbers = TypeVar("Numbers", NDArray[np.uint8], NDArray[np.float32])


def strongest_of(planes: Numbers) -> Numbers:
    """Return the maximum over the channels, (3, h, w) to (h, w)."""
    strongest: Numbers = np.maximum(np.maximum(planes[0], planes[1]), planes[2])
    return strongest


def weakest_of(planes: Numbers) -> Numbers:
    """Return the minimum over the channels, (3, h, w) to (h, w)."""
    weakest: Numbers = np.minimum(np.minimum(planes[0], planes[1]), planes[2])
    return weakest


def _sample(rgb: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return planes (3, h, w) of every n-th pixel: enough of them for statistics."""
    step = max(1, int(np.sqrt(rgb.shape[0] * rgb.shape[1] / SAMPLE_PX)))
    return np.ascontiguousarray(rgb[::step, ::step].transpose(2, 0, 1))


def is_dark(rgb: NDArray[np.uint8]) -> bool:
    """Return whether the background is dark: most pixels dark, hardly any bright (fluorescence)."""
    planes = _sample(rgb)
    dark, bright = strongest_of(planes) < DARK_LEVEL, weakest_of(planes) > BRIGHT_LEVEL
    return bool(dark.mean() > 0.5 and bright.mean() < 0.1)


def find_glass(rgb: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Return the colour of empty glass.

    Stain and ink lower the weakest channel, so glass is the highest level of that channel at which a share of at
    least 0.3 % of the pixels gathers. On a slide without glass a near-white is assumed.

    Parameters
    ----------
    rgb : (h, w, 3) uint8

    Returns
    -------
    (3,) float64
    """
    planes = _sample(rgb)
    weakest = weakest_of(planes)
    share = ndimage.uniform_filter1d(np.bincount(weakest.ravel(), minlength=256) / weakest.size, 5, mode="constant") * 5
    low, high = GLASS_LEVELS
    peaks = [
        level
        for level in range(high, low - 1, -1)
        if share[level] >= GLASS_MIN_SHARE and share[level] >= share[max(0, level - 4) : level + 5].max()
    ]
    colour = strongest_of(planes) - weakest
    for level in peaks:
        chosen = (np.abs(weakest.astype(np.int16) - level) <= 2) & (colour <= 40)
        if chosen.mean() >= GLASS_MIN_SHARE / 2:
            return np.asarray(np.median(planes[:, chosen], axis=1), np.float64)
    return np.array(DEFAULT_GLASS)


def to_optical_density(rgb: NDArray[np.uint8], glass: NDArray[np.float64]) -> Density:
    """Return -log10 of the transmission per channel, 0 where it is as bright as glass or brighter.

    Parameters
    ----------
    rgb : (h, w, 3) uint8
    glass : (3,) float64

    Returns
    -------
    (3, h, w) float32
    """
    density = np.empty((3, *rgb.shape[:2]), np.float32)
    for channel, light in enumerate(glass):
        table = np.log10((light + 1) / (np.arange(256) + 1)).clip(0).astype(np.float32)
        density[channel] = table[rgb[..., channel]]
    return density


def stain_threshold(stain: NDArray[np.float32]) -> float:
    """Return the difference between channels from which a pixel counts as stained.

    Otsu's threshold on the logarithm, within bounds that hold when everything or nothing is tissue.

    Parameters
    ----------
    stain : (h, w) float32
        Strongest minus weakest optical density.
    """
    low, high = STAIN_RANGE
    step = max(1, int(np.sqrt(stain.size / SAMPLE_PX)))
    values = np.log(np.clip(stain[::step, ::step], low / 4, 1.0))
    if values.max() - values.min() < 1e-3:
        return high
    return float(np.clip(np.exp(threshold_otsu(values)), low, high))  # type: ignore[no-untyped-call]


def find_pen(density: Density, candidates: Mask, mpp: float) -> Mask:
    """Find marker strokes.

    By colours that haematoxylin, eosin and DAB do not have; ink of the stains' own colours by its evenness, and red
    ink, which has the colour of packed red blood cells, by lying on glass. If most of the candidates would be ink,
    the colour is taken for the stain itself and nothing is removed.

    Parameters
    ----------
    density : (3, h, w) float32
        Optical density.
    candidates : (h, w) bool
        What would count as tissue.
    mpp : float
        µm per pixel.

    Returns
    -------
    (h, w) bool
    """
    strongest = strongest_of(density)
    pen = _where(strongest > 0.3, density, _has_colour_of_no_stain)
    if mpp <= FLAT_MAX_MPP:
        pen |= _pieces_on_glass(_even_and_strong(strongest, mpp), candidates, mpp)
    pen |= _pieces_on_glass(_where(strongest > 0.35, density, _is_red), candidates, mpp)
    pen = drop_small(pen, PEN_MIN_UM2 / mpp**2, keep_largest=False)
    if not pen.any():
        return pen
    pen = grow(pen, PEN_GROW_UM / mpp)
    is_stain = (pen & candidates).sum() > PEN_SHARE_LIMIT * max(candidates.sum(), 1)
    return np.zeros_like(pen) if is_stain else pen


def _where(strong: Mask, density: Density, rule: Callable[[Density], Mask]) -> Mask:
    """Apply a rule to the pixels where it can be true."""
    found = np.zeros_like(strong)
    found[strong] = rule(density[:, strong])
    return found


def _has_colour_of_no_stain(density: Density) -> Mask:
    red, green, blue = density
    strongest = strongest_of(density)
    blue_ink = (red > 1.25 * green) & (red - green > 0.1) | (red > 1.12 * green) & (red > 0.6)
    green_ink = (green < 0.85 * red) & (green < 0.85 * blue)
    yellow_ink = (green < 0.5 * blue) & (red < 0.4 * blue)
    black_ink = (weakest_of(density) > 0.85 * strongest) & (strongest > 0.5)
    return np.asarray(blue_ink | green_ink | yellow_ink | black_ink)


def _is_red(density: Density) -> Mask:
    red, green, blue = density
    return np.asarray((green > 0.35) & (blue > 0.62 * green) & (red < 0.3 * green) & (blue < 1.25 * green))


def _even_and_strong(strongest: NDArray[np.float32], mpp: float) -> Mask:
    """Return where density is high and even over 40 µm, which tissue with its nuclei is not."""
    side = max(3, round(FLAT_UM / mpp))
    mean = ndimage.uniform_filter(strongest, side)
    variance = ndimage.uniform_filter(strongest**2, side) - mean**2
    return grow((mean > 0.4) & (variance < (FLAT_VARIATION * mean) ** 2), side // 2)


def _pieces_on_glass(ink: Mask, candidates: Mask, mpp: float) -> Mask:
    """Keep the parts of large pieces that lie on glass, to be told by most of their rim."""
    least, reach = PEN_MIN_UM2 / mpp**2, max(4, round(RIM_UM / mpp))
    labels, _ = ndimage.label(drop_small(ink, least, keep_largest=False))
    kept = np.zeros_like(ink)
    for number, place in enumerate(ndimage.find_objects(labels), start=1):
        window = tuple(slice(max(0, side.start - reach), side.stop + reach) for side in place)
        kept[window] |= _part_on_glass(labels[window] == number, candidates[window], reach, least)
    return kept


def _part_on_glass(piece: Mask, tissue: Mask, reach: int, least: float) -> Mask:
    """Cut a piece where its surroundings change from glass to tissue; return the parts with glass around."""
    blurred_rim = 2
    nearest = ndimage.distance_transform_edt(grow(piece, blurred_rim), return_distances=False, return_indices=True)
    parts, _ = ndimage.label(drop_small(piece & ~tissue[tuple(nearest)], least, keep_largest=False))
    kept = np.zeros_like(piece)
    for number in range(1, parts.max(initial=0) + 1):
        part = parts == number
        rim = grow(part, reach) & ~grow(part, blurred_rim)
        if (rim & ~tissue & ~piece).sum() > ON_GLASS_SHARE * rim.sum():
            kept |= part
    return kept
