"""Colours of a bright-field overview: glass and stain.

Two things set tissue apart. It is stained: it absorbs one channel more than another. And it has grain: nuclei, fibres
and gaps make neighbouring cells differ, while glass varies by no more than the noise of the camera, be it clear, tinted
by spilt eosin, yellow with glue or in a shadow.
"""

import math

import numpy as np
from numpy.typing import NDArray

from eosin.wsi._morphology import Mask, grow, window_sums

DARK_LEVEL = 60
BRIGHT_LEVEL = 140
STAIN_RANGE = (0.022, 0.04)
SAMPLE_PX = 50_000
GLASS_MIN_SHARE = 0.003
GLASS_LEVELS = (120, 255)
DEFAULT_GLASS = (245.0, 245.0, 245.0)
PALE_DENSITY = 0.15
SHADOW_DENSITY = 0.4
SHADOW_COLOUR = 0.3
STRONG_STAIN = 2.5
GREY_SHARE = 0.5
GRAIN_SIDE = 5
CLEAR_SHARE = 0.1  # of what looks like glass the most may be the palest tissue
GRAIN_RATIO = 2.8  # between the clearest tenth of the windows and nearly all
BEND_OF_GLASS = (5.0, 12.0)  # levels; between no noise at all and more than a picture of 8 µm per pixel has
MAX_BEND = 2 * 255

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


def is_stained(
    darkest: NDArray[np.uint8], lightest: NDArray[np.uint8], threshold: float, *, colour: float = 0.0
) -> Mask:
    """Return where the optical density of two channels differs by more than a threshold.

    Parameters
    ----------
    darkest, lightest : (h, w) uint8
        From `darkest_of` and `lightest_of`.
    threshold : float
        Difference of optical density.
    colour : float
        Share of the stronger density that the difference has to be, too: what is grey has less.
    """
    weaker = DENSITY_OF_LIGHT.astype(np.float64)
    limits = 256 * 10.0 ** -np.maximum(weaker + threshold, weaker / (1 - colour)) - 1
    table = np.ceil(limits).clip(0, 255).astype(np.uint8)  # the darkest channel must be below
    return np.asarray(darkest < look_up(table, lightest))


def grey_limit(planes: Planes, threshold: float) -> float:
    """Return how little colour, as a share of the density, tissue of a slide may have.

    Half of what its strongly stained tissue has: some stains are nearly grey, and then so is the tissue; on other
    slides grey is dirt, print on the glass and the edge of the cover slip.
    """
    step = sample_step(planes.shape[1:])
    few = planes[:, ::step, ::step]
    strongest, weakest = DENSITY_OF_LIGHT[darkest_of(few)], DENSITY_OF_LIGHT[lightest_of(few)]
    strong = strongest - weakest > STRONG_STAIN * threshold
    return GREY_SHARE * float(np.median(1 - weakest[strong] / strongest[strong])) if strong.any() else 0.0


def bends_of(plane: NDArray[np.uint8]) -> NDArray[np.uint16]:
    """Return how much the light bends at each cell, in levels, (h, w): its second differences along row and column.

    A slope counts for nothing: shadows and washed-out stain are slopes.
    """
    level = plane.astype(np.int16)
    bends = np.zeros(plane.shape, np.uint16)
    across, down = np.diff(level, axis=1), np.diff(level, axis=0)
    bends[:, 1:-1] += np.abs(across[:, 1:] - across[:, :-1]).view(np.uint16)
    bends[1:-1] += np.abs(down[1:] - down[:-1]).view(np.uint16)
    return bends


def roughness(bends: NDArray[np.uint16]) -> NDArray[np.uint16]:
    """Return the sum of the bends of 5 x 5 cells, (h, w)."""
    return window_sums(bends, GRAIN_SIDE, most=2 * MAX_BEND).astype(np.uint16, copy=False)


def grain_limit(rough: NDArray[np.uint16], glass: Mask) -> float:
    """Return the roughness below which there is no grain: that of clear glass.

    Clear glass is cut off at white, so that what is tinted shows more of the same noise.
    """
    step = sample_step(rough.shape)
    noise = rough[::step, ::step][glass[::step, ::step]]
    low, high = (GRAIN_SIDE**2 * bend for bend in BEND_OF_GLASS)
    return float(np.clip(GRAIN_RATIO * np.quantile(noise, CLEAR_SHARE), low, high)) if noise.size else low


def is_smooth_glass(
    darkest: NDArray[np.uint8], lightest: NDArray[np.uint8], rough: NDArray[np.uint16], limit: float
) -> Mask:
    """Return where glass is tinted: pale, or in a shadow that is nearly grey, and without grain.

    A cell is smooth when one of the windows that hold it is, so that the edge of a band is as smooth as its middle.
    """
    pale = darkest > light_at(PALE_DENSITY)
    pale |= (darkest > light_at(SHADOW_DENSITY)) & ~is_stained(darkest, lightest, 0.0, colour=SHADOW_COLOUR)
    return np.asarray(grow(rough < limit, GRAIN_SIDE // 2) & pale)
