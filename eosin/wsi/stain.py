"""Colours of a bright-field overview: glass, stain, marker ink."""

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from skimage.filters import threshold_otsu

DARK_LEVEL = 60
BRIGHT_LEVEL = 140
STAIN_RANGE = (0.022, 0.04)
GLASS_MIN_SHARE = 0.003
GLASS_LEVELS = (120, 255)
DEFAULT_GLASS = (245.0, 245.0, 245.0)
PEN_SHARE_LIMIT = 0.67
PEN_MIN_UM2 = 20_000.0
PEN_GROW_UM = 16.0
FLAT_UM = 40.0
FLAT_MAX_MPP = 12.0
FLAT_VARIATION = 0.02


def is_dark(rgb: NDArray[np.uint8]) -> bool:
    """Return whether the background is dark: most pixels dark, hardly any bright (fluorescence)."""
    brightest = rgb.max(axis=2)
    return bool((brightest < DARK_LEVEL).mean() > 0.5 and (rgb.min(axis=2) > BRIGHT_LEVEL).mean() < 0.1)


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
    weakest = rgb.min(axis=2)
    share = ndimage.uniform_filter1d(np.bincount(weakest.ravel(), minlength=256) / weakest.size, 5, mode="constant") * 5
    low, high = GLASS_LEVELS
    peaks = [
        level
        for level in range(high, low - 1, -1)
        if share[level] >= GLASS_MIN_SHARE and share[level] >= share[max(0, level - 4) : level + 5].max()
    ]
    grey = rgb.max(axis=2).astype(np.int16) - weakest
    for level in peaks:
        chosen = (np.abs(weakest.astype(np.int16) - level) <= 2) & (grey <= 40)
        if chosen.mean() >= GLASS_MIN_SHARE / 2:
            return np.asarray(np.median(rgb[chosen], axis=0), np.float64)
    return np.array(DEFAULT_GLASS)


def to_optical_density(rgb: NDArray[np.uint8], glass: NDArray[np.float64]) -> NDArray[np.float32]:
    """Return -log10 of the transmission per channel, 0 where it is as bright as glass or brighter.

    Parameters
    ----------
    rgb : (h, w, 3) uint8
    glass : (3,) float64

    Returns
    -------
    (h, w, 3) float32
    """
    table = np.log10((glass[None] + 1) / (np.arange(256)[:, None] + 1)).clip(0).astype(np.float32)  # (256, 3)
    return np.stack([table[rgb[..., channel], channel] for channel in range(3)], axis=-1)


def stain_threshold(stain: NDArray[np.float32]) -> float:
    """Return the difference between channels from which a pixel counts as stained.

    Otsu's threshold on the logarithm, within bounds that hold when everything or nothing is tissue.

    Parameters
    ----------
    stain : (h, w) float32
        Strongest minus weakest optical density.
    """
    low, high = STAIN_RANGE
    values = np.log(np.clip(stain, low / 4, 1.0))
    if values.max() - values.min() < 1e-3:
        return high
    return float(np.clip(np.exp(threshold_otsu(values)), low, high))  # type: ignore[no-untyped-call]


def find_pen(density: NDArray[np.float32], candidates: NDArray[np.bool_], mpp: float) -> NDArray[np.bool_]:
    """Find marker strokes by colours that haematoxylin, eosin and DAB do not have.

    Strong ink is the seed; its faint rim follows when it touches. If most of the candidates would be ink, the colour
    is taken for the stain itself and nothing is removed.

    Parameters
    ----------
    density : (h, w, 3) float32
        Optical density.
    candidates : (h, w) bool
        What would count as tissue.
    mpp : float
        µm per pixel.

    Returns
    -------
    (h, w) bool
    """
    like_stain = _flat_ink(density, mpp) | _red_ink(density)
    inks = _ink_of_no_stain(density) | _pieces_on_glass(like_stain, candidates, mpp)
    pen = _pieces_from(inks, PEN_MIN_UM2 / mpp**2)
    if not pen.any():
        return pen
    grown = ndimage.distance_transform_edt(~pen) <= PEN_GROW_UM / mpp
    if (grown & candidates).sum() > PEN_SHARE_LIMIT * max(candidates.sum(), 1):
        return np.zeros_like(pen)
    return np.asarray(grown)


def _ink_of_no_stain(density: NDArray[np.float32]) -> NDArray[np.bool_]:
    red, green, blue = np.moveaxis(density, -1, 0)
    strongest = density.max(axis=2)
    strong = strongest > 0.3
    blue_ink = (red > 1.25 * green) & (red - green > 0.1) | (red > 1.12 * green) & (red > 0.6)
    green_ink = (green < 0.85 * red) & (green < 0.85 * blue)
    yellow_ink = (green < 0.5 * blue) & (red < 0.4 * blue)
    black_ink = (density.min(axis=2) > 0.85 * strongest) & (strongest > 0.5)
    return np.asarray(strong & (blue_ink | green_ink | yellow_ink | black_ink))


def _flat_ink(density: NDArray[np.float32], mpp: float) -> NDArray[np.bool_]:
    """Ink of the stains' own colours: strong and even over 40 µm, which tissue with its nuclei is not."""
    if mpp > FLAT_MAX_MPP:
        return np.zeros(density.shape[:2], bool)
    strongest = density.max(axis=2).astype(np.float64)
    side = max(3, round(FLAT_UM / mpp))
    mean = ndimage.uniform_filter(strongest, side)
    variance = ndimage.uniform_filter(strongest**2, side) - mean**2
    flat = (mean > 0.4) & (variance < (FLAT_VARIATION * mean) ** 2)
    return np.asarray(ndimage.binary_dilation(flat, iterations=side // 2))


def _red_ink(density: NDArray[np.float32]) -> NDArray[np.bool_]:
    red, green, blue = np.moveaxis(density, -1, 0)
    return np.asarray((green > 0.35) & (blue > 0.62 * green) & (red < 0.3 * green) & (blue < 1.25 * green))


def _pieces_on_glass(ink: NDArray[np.bool_], candidates: NDArray[np.bool_], mpp: float) -> NDArray[np.bool_]:
    """Keep the pieces that lie mostly on glass: packed red blood cells look like ink but lie inside tissue."""
    labels, count = ndimage.label(ink)
    if count == 0:
        return ink
    around = max(2.0, 40.0 / mpp)
    distance, nearest = ndimage.distance_transform_edt(~ink, return_indices=True)
    rim = (distance > 2) & (distance <= around)
    owner = labels[tuple(nearest)]
    rims = np.bincount(owner[rim], minlength=count + 1)
    in_tissue = np.bincount(owner[rim & candidates], minlength=count + 1)
    on_glass = in_tissue < 0.5 * np.maximum(rims, 1)
    on_glass[0] = False
    return np.asarray(on_glass[labels])


def _pieces_from(mask: NDArray[np.bool_], min_cells: float) -> NDArray[np.bool_]:
    labels, count = ndimage.label(mask, structure=np.ones((3, 3)))
    if count == 0:
        return mask
    sizes = np.bincount(labels.ravel())
    keep = sizes >= min_cells
    keep[0] = False
    return np.asarray(keep[labels])
