"""Marker ink on an overview: told by colours that no stain has, and by its evenness.

scipy is loaded by the functions that need it: it takes as long as five slides, and most slides have nothing like ink.
"""

from collections.abc import Callable
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from eosin.wsi._morphology import Mask, drop_small, grow, pieces_touching, window_means, window_sums
from eosin.wsi._stain import (
    DENSITY_OF_LIGHT,
    GRAIN_SIDE,
    MAX_BEND,
    Density,
    Planes,
    is_stained,
    light_at,
    lightest_of,
    look_up,
)

PEN_SHARE_LIMIT = 0.67
PEN_MIN_UM2 = 10_000.0
PEN_GROW_UM = 24.0
PEN_MIN_DENSITY = 0.06
FADING_UM = 150.0
RIM_UM = 40.0
PEN_REACH_UM = 2 * (PEN_GROW_UM + RIM_UM)
ON_GLASS_SHARE = 0.6
EVEN_MAX_MPP = 12.0
EVEN_DENSITY = 0.4
EVEN_VARIATION = 0.02
BLACK_DENSITY = 0.8
GREY_COLOUR = 0.3
INK_VARIATION = 0.06
BEND_OF_NOISE = 3.9  # mean of the two second differences of values that vary by 1


class Grain(Protocol):
    """How much a picture varies from cell to cell, at 12 µm per cell or finer."""

    def where_even(self) -> Mask:
        """Return where density is high and even, which tissue with its nuclei is not."""

    def is_even(self, ink: Mask) -> bool:
        """Return whether what may be ink varies as little from cell to cell as ink does and tissue does not."""


class OwnGrain:
    """The grain of the picture itself.

    Parameters
    ----------
    darkest : (h, w) uint8
        From `eosin.wsi._stain.darkest_of`.
    bends : (h, w) uint16
        Of the same, from `eosin.wsi._stain.bends_of`.
    mpp : float
        µm per pixel.
    """

    def __init__(self, darkest: NDArray[np.uint8], bends: NDArray[np.uint16], mpp: float) -> None:
        self._darkest = darkest
        self._bends = bends
        self._mpp = mpp

    def where_even(self) -> Mask:
        """Return where density is high and even; on pictures too coarse to show nuclei, where it is black and even."""
        even = find_even(self._darkest, self._bends)
        return even if self._mpp <= EVEN_MAX_MPP else even & is_black(self._darkest)

    def is_even(self, ink: Mask) -> bool:
        """Return whether most of what may be ink is even."""
        rows, columns = (slice(found.min(), found.max() + 1) for found in np.nonzero(ink))
        varied = variation(self._darkest[rows, columns], ink[rows, columns])
        return bool(varied.size and np.median(varied) < INK_VARIATION)


def find_pen(planes: Planes, darkest: NDArray[np.uint8], candidates: Mask, mpp: float, grain: Grain) -> Mask:
    """Find marker strokes.

    By colours that haematoxylin, eosin and DAB do not have, at full strength and, beside that, where the stroke fades;
    red ink, which has the colour of packed red blood cells, also by lying on glass, and so, when it is even, black ink
    and ink of the stains' own colours. If most of the candidates would be ink and that is not as even as ink is, the
    colour is treated as the stain itself and nothing is removed.

    Parameters
    ----------
    planes : (3, h, w) uint8
        From `eosin.wsi._stain.to_light`.
    darkest : (h, w) uint8
        From `eosin.wsi._stain.darkest_of`.
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
    least, reach = PEN_MIN_UM2 / mpp**2, FADING_UM / mpp
    may_be_cold = (planes[1] > darkest) & (darkest < light_at(PEN_MIN_DENSITY))  # green absorbs less than another
    cold, pale_cold = _where(may_be_cold, planes, is_cold, is_pale_cold)
    pen = _strokes(cold, pale_cold, least, reach)
    bright, pale, red = _where(_may_be_red(planes), planes, is_bright_red, is_pale_red, is_red)
    pen |= _strokes(bright, pale, least, reach) | _pieces_on_glass(red, candidates, mpp)
    even = grain.where_even()
    if even.any():
        grey = (darkest < light_at(PEN_MIN_DENSITY)) & ~is_stained(darkest, lightest_of(planes), 0, colour=GREY_COLOUR)
        even |= _strokes(even & is_black(darkest), grey, least, reach)
        pen |= _pieces_on_glass(even, candidates, mpp)
    pen = drop_small(pen, least, keep_largest=False)
    if not pen.any():
        return pen
    core, pen = pen, grow(pen, PEN_GROW_UM / mpp)
    most = (pen & candidates).sum() > PEN_SHARE_LIMIT * max(candidates.sum(), 1)
    return np.zeros_like(pen) if most and not grain.is_even(core) else pen


def _where(perhaps: Mask, planes: Planes, *rules: Callable[[Density], Mask]) -> list[Mask]:
    """Apply rules to the pixels where they can be true."""
    found = [np.zeros_like(perhaps) for _ in rules]
    if perhaps.any():
        density = DENSITY_OF_LIGHT[planes[:, perhaps]]
        for mask, rule in zip(found, rules, strict=True):
            mask[perhaps] = rule(density)
    return found


def _strokes(strong: Mask, faded: Mask, least: float, reach: float) -> Mask:
    """Return the large pieces of what is ink for certain, with those of its paler shades that lead there."""
    strong = drop_small(strong, least, keep_largest=False)
    return pieces_touching(strong | (faded & grow(strong, reach)), strong) if strong.any() else strong


def is_cold(density: Density) -> Mask:
    """Return which pixels can only be blue, green or yellow ink, from densities of red, green and blue, (3, n) to (n,).

    Haematoxylin absorbs red at most 1.4 times as much as green, also where it is pale; green and blue ink twice and
    more. Very dark ink of these colours is closer to grey.
    """
    red, green, blue = density
    yellow = (green < 0.5 * blue) & (red < 0.4 * blue) & (blue > 0.3)
    blue_ink = (red > 1.25 * green) & (red - green > 0.1) | (red > 1.12 * green) & (red > 0.6)
    return np.asarray(((red > 1.6 * green) & (red > 0.08)) | blue_ink | yellow)


def is_pale_cold(density: Density) -> Mask:
    """Return which pixels can be blue or green ink of any strength, (3, n) to (n,)."""
    red, green, _ = density
    return np.asarray(red > 1.25 * green)


def _may_be_red(planes: Planes) -> Mask:
    """Return the few pixels that may be red: green absorbs, red hardly."""
    least_red = np.floor(256 * 10.0 ** (-0.3 * DENSITY_OF_LIGHT) - 1).astype(np.uint8)
    return np.asarray((planes[1] < light_at(0.2)) & (planes[0] >= look_up(least_red, planes[1])))


def is_bright_red(density: Density) -> Mask:
    """Return which pixels can only be red ink, (3, n) to (n,).

    Blood that absorbs half a decade of green absorbs some red, too; eosin absorbs less blue.
    """
    red, green, blue = density
    return np.asarray((green > 0.5) & (red < 0.13 * green) & (blue > 0.68 * green))


def is_pale_red(density: Density) -> Mask:
    """Return which pixels can be red ink of any strength, (3, n) to (n,)."""
    red, green, blue = density
    return np.asarray((green > 0.2) & (red < 0.28 * green) & (blue > 0.66 * green))


def is_red(density: Density) -> Mask:
    """Return which pixels are ink or blood, (3, n) to (n,)."""
    red, green, blue = density
    return np.asarray((green > 0.35) & (blue > 0.62 * green) & (red < 0.3 * green) & (blue < 1.25 * green))


def is_black(darkest: NDArray[np.uint8]) -> Mask:
    """Return where so little light is left that only ink is even: tissue as dense is folded or full of nuclei."""
    return darkest < light_at(BLACK_DENSITY)


def variation(darkest: NDArray[np.uint8], ink: Mask) -> Density:
    """Return the relative variation of density among the 3 x 3 neighbours of the cells well inside ink, (n,)."""
    inner = ~grow(~ink, 2)
    density = DENSITY_OF_LIGHT[darkest]
    mean = window_means(density, 3)
    variance = window_means(density**2, 3) - mean**2
    return np.asarray(np.sqrt(variance[inner].clip(0)) / mean[inner])


def find_even(darkest: NDArray[np.uint8], bends: NDArray[np.uint16], *, side: int = GRAIN_SIDE) -> Mask:
    """Return where density is high and varies by less than 2 %, which that of tissue with its nuclei does not.

    Parameters
    ----------
    darkest : (h, w) uint8
        From `eosin.wsi._stain.darkest_of`.
    bends : (h, w) uint16
        Of the same, from `eosin.wsi._stain.bends_of`.
    side : int
        Of the windows that have to be even, in cells.
    """
    light = np.arange(256) + 1.0
    limits = side**2 * BEND_OF_NOISE * EVEN_VARIATION * np.log(10) * light * DENSITY_OF_LIGHT
    rough = window_sums(bends, side, most=2 * MAX_BEND)
    dense = darkest < light_at(EVEN_DENSITY)
    even = np.zeros_like(dense)
    even[dense] = rough[dense] < limits[darkest[dense]]
    return grow(even, side // 2) & dense


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
