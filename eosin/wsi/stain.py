"""Colours of a bright-field overview: glass, stain, marker ink.

scipy is loaded by the functions that need it: it takes as long as five slides, and most slides have nothing like ink.
"""

import math
from collections.abc import Callable
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from eosin.wsi.morphology import Mask, drop_small, find_windows, grow, slide_extremes, window_means

DARK_LEVEL = 60
BRIGHT_LEVEL = 140
STAIN_RANGE = (0.022, 0.04)
SAMPLE_PX = 50_000
GLASS_MIN_SHARE = 0.003
GLASS_LEVELS = (120, 255)
DEFAULT_GLASS = (245.0, 245.0, 245.0)
PEN_SHARE_LIMIT = 0.67
PEN_MIN_UM2 = 10_000.0
PEN_GROW_UM = 24.0
PEN_MIN_DENSITY = 0.3
RIM_UM = 40.0
PEN_REACH_UM = 2 * (PEN_GROW_UM + RIM_UM)
ON_GLASS_SHARE = 0.6
FLAT_UM = 40.0
FLAT_MAX_MPP = 12.0
FLAT_VARIATION = 0.02
INK_VARIATION = 0.06

Planes = NDArray[np.uint8]  # (3, h, w): light of red, green and blue, 255 as bright as glass
Density = NDArray[np.float32]  # (3, n): optical density of red, green and blue
DENSITY_OF_LIGHT = -np.log10((np.arange(256) + 1) / 256).astype(np.float32)


def lightest_of(planes: Planes) -> NDArray[np.uint8]:
    """Return the brightest channel, (3, h, w) to (h, w): where optical density is weakest."""
    return np.asarray(planes.max(axis=0))


def darkest_of(planes: Planes) -> NDArray[np.uint8]:
    """Return the darkest channel, (3, h, w) to (h, w): where optical density is strongest."""
    return np.asarray(planes.min(axis=0))


def light_at(density: float) -> int:
    """Return the least light, on the scale of `Planes`, that a lower optical density than this lets through."""
    return math.ceil(256 * math.pow(10.0, -density) - 1)


def look_up(table: NDArray[np.uint8], plane: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return ``table[plane]``; ten times as fast as numpy's indexing."""
    return np.frombuffer(plane.tobytes().translate(table.tobytes()), np.uint8).reshape(plane.shape)


def sample_step(shape: tuple[int, int]) -> int:
    """Return n such that every n-th row and column of a picture is enough for statistics."""
    return max(1, int(np.sqrt(shape[0] * shape[1] / SAMPLE_PX)))


def is_dark(planes: Planes) -> bool:
    """Return whether the background is dark: most pixels dark, hardly any bright (fluorescence)."""
    dark, bright = lightest_of(planes) < DARK_LEVEL, darkest_of(planes) > BRIGHT_LEVEL
    return bool(dark.mean() > 0.5 and bright.mean() < 0.1)


def find_glass(planes: Planes) -> NDArray[np.float64]:
    """Return the colour of empty glass.

    Stain and ink lower the darkest channel, so glass is the highest level of that channel at which a share of at
    least 0.3 % of the pixels gathers. On a slide without glass a near-white is assumed.

    Parameters
    ----------
    planes : (3, h, w) uint8
        Red, green and blue of the slide, of all pixels or some.

    Returns
    -------
    (3,) float64
    """
    darkest = darkest_of(planes)
    is_grey = lightest_of(planes) - darkest <= 40
    share = np.convolve(np.bincount(darkest.ravel(), minlength=256) / darkest.size, np.ones(5), "same")
    low, high = GLASS_LEVELS
    peaks = [
        level
        for level in range(high, low - 1, -1)
        if share[level] >= GLASS_MIN_SHARE and share[level] >= share[max(0, level - 4) : level + 5].max()
    ]
    for level in peaks:
        chosen = np.flatnonzero((darkest >= level - 2) & (darkest <= min(level + 2, 255)) & is_grey)
        if len(chosen) >= GLASS_MIN_SHARE / 2 * darkest.size:
            return np.array([_median(plane.ravel()[chosen]) for plane in planes])
    return np.array(DEFAULT_GLASS)


def _median(values: NDArray[np.uint8]) -> float:
    """Return the median of bytes, by counting."""
    below = np.bincount(values, minlength=256).cumsum()
    low, high = np.searchsorted(below, [(len(values) - 1) // 2, len(values) // 2], "right")
    return float(low + high) / 2


def to_light(rgb: NDArray[np.uint8], glass: NDArray[np.float64]) -> Planes:
    """Return how much light each pixel lets through: 255 as bright as glass or brighter, per channel.

    Kept in 8 bits, which is what the pixels have: an overview of 100 million pixels is handled in a tenth of the time
    and a quarter of the memory of floating-point densities.

    Parameters
    ----------
    rgb : (h, w, 3) uint8
    glass : (3,) float64

    Returns
    -------
    (3, h, w) uint8
    """
    planes = np.empty((3, *rgb.shape[:2]), np.uint8)
    for channel, light in enumerate(glass):
        planes[channel] = look_up(_light_table(light), rgb[..., channel])
    return planes


def _light_table(glass: float) -> NDArray[np.uint8]:
    light = np.rint((np.arange(256) + 1) / (glass + 1) * 256) - 1
    return np.asarray(light.clip(0, 255), np.uint8)


def total_density(planes: Planes, unit: int) -> NDArray[np.uint8]:
    """Return the optical density of the three channels together, (h, w), in `unit`-ths; of each channel at most 85."""
    densities = np.minimum(np.rint(DENSITY_OF_LIGHT * unit), 85).astype(np.uint8)
    red, green, blue = (look_up(densities, plane) for plane in planes)
    return np.asarray(red + green + blue)


def blur_density(planes: Planes, sigma: float) -> Planes:
    """Return the planes with their optical density smoothed."""
    from scipy import ndimage

    smooth = np.empty_like(planes)
    for channel, plane in enumerate(planes):
        density = ndimage.gaussian_filter(DENSITY_OF_LIGHT[plane], sigma)
        smooth[channel] = np.rint(256 * 10.0**-density - 1).clip(0, 255)
    return smooth


def stain_threshold(planes: Planes) -> float:
    """Return the difference of optical density between channels from which a pixel counts as stained.

    Otsu's threshold on the logarithm, within bounds that hold when everything or nothing is tissue.

    Parameters
    ----------
    planes : (3, h, w) uint8
        From `to_light`.
    """
    low, high = STAIN_RANGE
    step = sample_step(planes.shape[1:])
    few = planes[:, ::step, ::step]
    pairs = np.bincount((darkest_of(few).astype(np.uint16) << 8 | lightest_of(few)).ravel(), minlength=2**16)
    there = np.flatnonzero(pairs)
    stain = DENSITY_OF_LIGHT[there >> 8] - DENSITY_OF_LIGHT[there & 255]
    values = np.log(np.clip(stain, low / 4, 1.0))
    if values.max() - values.min() < 1e-3:
        return high
    counts, edges = np.histogram(values, 256, weights=pairs[there])
    centres = (edges[:-1] + edges[1:]) / 2
    return float(np.clip(np.exp(_otsu(counts, centres)), low, high))


def _otsu(counts: NDArray[np.float64], values: NDArray[np.float64]) -> float:
    """Return the value that parts a histogram with the largest variance between both sides (Otsu 1979)."""
    below, above = counts.cumsum()[:-1], counts[::-1].cumsum()[::-1][1:]
    sums = (counts * values).cumsum()
    between = below * above * (sums[:-1] / below - (sums[-1] - sums[:-1]) / above) ** 2
    return float(values[np.argmax(between)])


def is_stained(darkest: NDArray[np.uint8], lightest: NDArray[np.uint8], threshold: float) -> Mask:
    """Return where the optical density of two channels differs by more than a threshold.

    Parameters
    ----------
    darkest, lightest : (h, w) uint8
        From `darkest_of` and `lightest_of`.
    threshold : float
        Difference of optical density.
    """
    limits = (np.arange(256) + 1) * 10.0**-threshold - 1
    table = np.ceil(limits).clip(0, 255).astype(np.uint8)  # the darkest channel must be below
    return np.asarray(darkest < look_up(table, lightest))


class Grain(Protocol):
    """How much a picture varies from cell to cell, at 12 µm per cell or finer."""

    def where_even(self) -> Mask:
        """Return where density is high and even over 40 µm, which tissue with its nuclei is not."""

    def is_even(self, ink: Mask) -> bool:
        """Return whether what may be ink varies as little from cell to cell as ink does and tissue does not."""


class OwnGrain:
    """The grain of the picture itself.

    Parameters
    ----------
    darkest : (h, w) uint8
        From `darkest_of`.
    mpp : float
        µm per pixel.
    """

    def __init__(self, darkest: NDArray[np.uint8], mpp: float) -> None:
        self._darkest = darkest
        self._mpp = mpp

    def where_even(self) -> Mask:
        """Return where density is high and even; nowhere on pictures that are too coarse to tell."""
        if self._mpp > FLAT_MAX_MPP:
            return np.zeros(self._darkest.shape, bool)
        return find_even(self._darkest, self._mpp)

    def is_even(self, ink: Mask) -> bool:
        """Return whether most of what may be ink is even."""
        rows, columns = (slice(found.min(), found.max() + 1) for found in np.nonzero(ink))
        varied = variation(self._darkest[rows, columns], ink[rows, columns])
        return bool(varied.size and np.median(varied) < INK_VARIATION)


def find_pen(planes: Planes, darkest: NDArray[np.uint8], candidates: Mask, mpp: float, grain: Grain) -> Mask:
    """Find marker strokes.

    By colours that haematoxylin, eosin and DAB do not have; ink of the stains' own colours by its evenness, and red
    ink, which has the colour of packed red blood cells, by lying on glass. If most of the candidates would be ink and
    that is not as even as ink is, the colour is taken for the stain itself and nothing is removed.

    Parameters
    ----------
    planes : (3, h, w) uint8
        From `to_light`.
    darkest : (h, w) uint8
        From `darkest_of`.
    candidates : (h, w) bool
        What would count as tissue.
    mpp : float
        µm per pixel.
    grain : Grain
        Of the same picture.

    Returns
    -------
    (h, w) bool
    """
    odd = (darkest < light_at(PEN_MIN_DENSITY)) & _is_not_darkest_in_green(planes, darkest)
    pen = _where(odd, planes, _has_colour_of_no_stain)
    pen |= _pieces_on_glass(grain.where_even(), candidates, mpp)
    pen |= _pieces_on_glass(_where(_may_be_red(planes), planes, _is_red), candidates, mpp)
    pen = drop_small(pen, PEN_MIN_UM2 / mpp**2, keep_largest=False)
    if not pen.any():
        return pen
    core, pen = pen, grow(pen, PEN_GROW_UM / mpp)
    most = (pen & candidates).sum() > PEN_SHARE_LIMIT * max(candidates.sum(), 1)
    return np.zeros_like(pen) if most and not grain.is_even(core) else pen


def _where(strong: Mask, planes: Planes, rule: Callable[[Density], Mask]) -> Mask:
    """Apply a rule to the pixels where it can be true."""
    found = np.zeros_like(strong)
    if strong.any():
        found[strong] = rule(DENSITY_OF_LIGHT[planes[:, strong]])
    return found


def _is_not_darkest_in_green(planes: Planes, darkest: NDArray[np.uint8]) -> Mask:
    """Return the few pixels that may have a colour of no stain: green does not absorb most, or all do (black)."""
    grey = np.ceil(256 * 10.0 ** (-0.85 * DENSITY_OF_LIGHT) - 1).astype(np.uint8)
    black = (darkest < light_at(0.5)) & (planes[0] <= look_up(grey, darkest))
    return np.asarray((planes[1] > darkest) | black)


def _has_colour_of_no_stain(density: Density) -> Mask:
    red, green, blue = density
    strongest = np.maximum(np.maximum(red, green), blue)
    weakest = np.minimum(np.minimum(red, green), blue)
    blue_ink = (red > 1.25 * green) & (red - green > 0.1) | (red > 1.12 * green) & (red > 0.6)
    green_ink = (green < 0.85 * red) & (green < 0.85 * blue)
    yellow_ink = (green < 0.5 * blue) & (red < 0.4 * blue)
    black_ink = (weakest > 0.85 * strongest) & (strongest > 0.5)
    return np.asarray(blue_ink | green_ink | yellow_ink | black_ink)


def _may_be_red(planes: Planes) -> Mask:
    """Return the few pixels that may be red: green absorbs, red hardly."""
    least_red = np.floor(256 * 10.0 ** (-0.3 * DENSITY_OF_LIGHT) - 1).astype(np.uint8)
    return np.asarray((planes[1] < light_at(0.35)) & (planes[0] >= look_up(least_red, planes[1])))


def _is_red(density: Density) -> Mask:
    red, green, blue = density
    return np.asarray((green > 0.35) & (blue > 0.62 * green) & (red < 0.3 * green) & (blue < 1.25 * green))


def variation(darkest: NDArray[np.uint8], ink: Mask) -> Density:
    """Return the relative variation of density among the 3 x 3 neighbours of the cells well inside ink, (n,)."""
    inner = ~grow(~ink, 2)
    density = DENSITY_OF_LIGHT[darkest]
    mean = window_means(density, 3)
    variance = window_means(density**2, 3) - mean**2
    return np.asarray(np.sqrt(variance[inner].clip(0)) / mean[inner])


def find_even(darkest: NDArray[np.uint8], mpp: float) -> Mask:
    """Return where density is high and even over 40 µm, which tissue with its nuclei is not."""
    side = max(3, round(FLAT_UM / mpp))
    found = np.zeros(darkest.shape, bool)
    perhaps = _perhaps_even(darkest, side)
    if not perhaps.any():
        return found
    for place in find_windows(perhaps, side):
        density = DENSITY_OF_LIGHT[darkest[place]]
        mean = window_means(density, side)
        variance = window_means(density**2, side) - mean**2
        found[place] |= (mean > 0.4) & (variance < (FLAT_VARIATION * mean) ** 2)
    return grow(found & perhaps, side // 2)


def _perhaps_even(darkest: NDArray[np.uint8], side: int) -> Mask:
    """Return the pixels whose window can be even: n values that vary by σ differ by at most σ·√(2n)."""
    found = np.zeros(darkest.shape, bool)
    if min(darkest.shape) < side:
        return found
    low, high = slide_extremes(darkest, side)
    spread = FLAT_VARIATION * side * np.sqrt(2)
    limits = 256 * 10.0 ** (-DENSITY_OF_LIGHT * (1 - spread)) - 1 if spread < 1 else np.full(256, 255.0)
    table = np.floor(limits + 1).clip(0, 255).astype(np.uint8)  # the brightest may be, given the darkest
    even = (high <= look_up(table, low)) & (low < light_at(0.4))
    found[side // 2 : side // 2 + even.shape[0], side // 2 : side // 2 + even.shape[1]] = even
    return found


def _pieces_on_glass(ink: Mask, candidates: Mask, mpp: float) -> Mask:
    """Keep the parts of large pieces that lie on glass, to be told by most of their rim."""
    least, reach = PEN_MIN_UM2 / mpp**2, max(4, round(RIM_UM / mpp))
    large = drop_small(ink, least, keep_largest=False)
    kept = np.zeros_like(ink)
    if not large.any():
        return kept
    from scipy import ndimage

    labels, _ = ndimage.label(large)
    for number, place in enumerate(ndimage.find_objects(labels), start=1):
        window = tuple(slice(max(0, side.start - reach), side.stop + reach) for side in place)
        kept[window] |= _part_on_glass(labels[window] == number, candidates[window], reach, least)
    return kept


def _part_on_glass(piece: Mask, tissue: Mask, reach: int, least: float) -> Mask:
    """Cut a piece where its surroundings change from glass to tissue; return the parts with glass around."""
    from scipy import ndimage

    blurred_rim = 2
    nearest = ndimage.distance_transform_edt(grow(piece, blurred_rim), return_distances=False, return_indices=True)
    parts, _ = ndimage.label(drop_small(piece & ~tissue[tuple(nearest)], least, keep_largest=False))
    kept = np.zeros_like(piece)
    for number in range(1, parts.max(initial=0) + 1):
        part = parts == number
        rim = grow(part, reach) & ~grow(part, blurred_rim) & ~piece
        if (rim & ~tissue).sum() > ON_GLASS_SHARE * rim.sum():
            kept |= part
    return kept
