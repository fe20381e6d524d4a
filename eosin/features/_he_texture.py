"""A tile descriptor of haematoxylin and eosin that needs no weights.

Colour deconvolution splits a tile into the amounts of haematoxylin and eosin. From both planes, and from a pyramid of
each, come statistics that a pathologist would name: how much stain, how uneven, how dense and how large the nuclei are,
how coarse and how directed the texture is. Many of them are ratios, so that a slide stained twice as strongly moves
little. Scales are stated in pixels; the names of cells hold at 0.5 µm per pixel.

Families of features, in order:

``od_*``, ``glass``
    Mean optical density of red, green and blue; share of nearly empty pixels.
``<stain>_mean``, ``<stain>_std``, ``<stain>_q*``, ``<stain>_contrast``, ``<stain>_tail``
    Statistics and quantiles of the amount of stain; spread and upper tail relative to the median.
``blueness``, ``overlap``
    Haematoxylin's share of all stain; correlation of the two stains over the tile.
``nuclei_*``
    Pixels above a threshold on haematoxylin: area, amount and evenness of stain inside. ``nuclei_left_*``: the share
    of that area that survives 1, 2, ... erosions (its root), which tells large nuclei from small ones.
    ``nuclei_count_*``: maxima of the smoothed haematoxylin per area at two scales (log scale).
``<stain>_core_*``
    The same erosions on the grey plane.
``<stain>_band_*``, ``<stain>_skew_*``, ``<stain>_patchy_*``
    Energy of the bands of a Laplacian pyramid relative to the mean (log scale), the skewness of a band (blobs or holes)
    and how unevenly its energy is spread over the tile.
``<stain>_edge``, ``<stain>_directed``
    Mean gradient relative to the mean; coherence of the structure tensor: 1 for parallel fibres, 0 for no direction.
``<stain>_lbp<level>_*``
    Rotation-invariant uniform local binary patterns, 10 bins (Ojala, Pietikäinen, Mäenpää, IEEE TPAMI 24, 2002).

The stain vectors are the reference of Macenko et al. (ISBI 2009); the normalisation constants are fixed, chosen so that
features of ordinary tissue are of order one. `REVISION` counts changes that alter any value.
"""

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]

REVISION = 1
"""Changes when any feature changes its value; belongs into the identity of features made with this module."""

MIN_TILE_PX = 32
"""Smallest side of a tile that the descriptor accepts."""

STAIN_VECTORS = ((0.5626, 0.7201, 0.4062), (0.2159, 0.8012, 0.5581))
GLASS_LEVEL = 245.0
FULL_DENSITY = 1.6  # amount of stain at which the bytes of a plane saturate
QUANTILES = (5, 25, 50, 75, 95, 99)
BANDS = 4
EROSIONS = 6
CHUNK_PX = 2**18  # pixels described at once: the planes of one chunk stay in cache
FAINT = np.float32(0.05)  # amount of stain below which ratios mean nothing


def describe(tiles: Bytes) -> Floats:
    """Describe tiles.

    Parameters
    ----------
    tiles : (b, h, w, 3) uint8
        RGB; sides of at least `MIN_TILE_PX`. Rows and columns beyond a multiple of 16 are ignored.

    Returns
    -------
    (b, D) float32
        In the order of `FEATURE_NAMES`; a row depends on its tile alone.

    Raises
    ------
    ValueError
        If the array is not a batch of RGB tiles, or they are smaller than `MIN_TILE_PX`.
    """
    if tiles.ndim != 4 or tiles.shape[3] != 3 or tiles.dtype != np.uint8 or min(tiles.shape[1:3]) < MIN_TILE_PX:
        expected = f"(b, h, w, 3) uint8 with sides of at least {MIN_TILE_PX} px"
        raise ValueError(f"expected tiles as {expected}, found {tiles.shape} {tiles.dtype}")
    height, width = (side // 16 * 16 for side in tiles.shape[1:3])
    step = max(1, CHUNK_PX // (height * width))
    raw = [_measure(tiles[i : i + step, :height, :width]) for i in range(0, len(tiles), step)]
    rows = np.concatenate([np.zeros((0, len(FEATURE_NAMES)), np.float32), *raw])
    return np.asarray(np.clip((rows - _CENTRE) / _SCALE, -8, 8), dtype=np.float32)


def _measure(tiles: Bytes) -> Floats:
    """Return the features (b, D) before normalisation."""
    density = np.take(_DENSITY, tiles, mode="clip")  # (b, h, w, 3)
    haematoxylin, eosin, grey = (_UNMIX @ density.reshape(-1, 3).T).reshape(3, *tiles.shape[:3])
    h, e = _Plane(haematoxylin), _Plane(eosin)
    pixels = density[0].size // 3
    columns = [
        np.full(pixels, np.float32(1 / pixels)) @ density.reshape(len(tiles), pixels, 3),
        (grey < 0.08).mean(axis=(1, 2))[:, None],
        *(_intensity(plane) for plane in (h, e)),
        _relation(h, e),
        _nuclei(h),
        *(_cores(plane) for plane in (h, e)),
        *(_bands(plane) for plane in (h, e)),
        *(_direction(plane) for plane in (h, e)),
        _patterns(h, 1),
        _patterns(h, 2),
        _patterns(e, 1),
    ]
    return np.concatenate([np.asarray(column, np.float32) for column in columns], axis=1)


class _Plane:
    """The amount of one stain over a chunk of tiles, and its pyramid of 2 × 2 means."""

    def __init__(self, amount: Floats) -> None:
        self.pyramid = [np.clip(amount, 0, FULL_DENSITY)]
        for _ in range(BANDS):
            self.pyramid.append(_halved(self.pyramid[-1]))
        self.mean = self.pyramid[-1].mean(axis=(1, 2))
        self.power = np.stack([(level * level).mean(axis=(1, 2)) for level in self.pyramid])  # (levels, b)
        self.half_bytes = _to_bytes(self.pyramid[1])


def _halved(plane: Floats) -> Floats:
    rows = plane[:, ::2] + plane[:, 1::2]
    return np.asarray((rows[..., ::2] + rows[..., 1::2]) * np.float32(0.25))


def _doubled(plane: Floats) -> Floats:
    return plane.repeat(2, axis=1).repeat(2, axis=2)


def _to_bytes(plane: Floats) -> Bytes:
    return np.asarray(plane * np.float32(255 / FULL_DENSITY), dtype=np.uint8)


def _intensity(plane: _Plane) -> Floats:
    full = plane.pyramid[0]
    std = np.sqrt(np.maximum(plane.power[0] - plane.mean**2, 0))
    levels = _quantiles(_to_bytes(full))
    median = levels[:, QUANTILES.index(50)] + FAINT
    contrast = np.log((levels[:, QUANTILES.index(95)] + FAINT) / median)
    tail = np.log((levels[:, QUANTILES.index(99)] + FAINT) / (levels[:, QUANTILES.index(75)] + FAINT))
    return np.column_stack([plane.mean, std, levels, contrast, tail]).astype(np.float32)


def _quantiles(planes: Bytes) -> NDArray[np.float64]:
    """Return (b, 6) amounts of stain from the histogram of each tile."""
    counts = np.stack([np.bincount(plane.ravel(), minlength=256) for plane in planes])
    below = counts.cumsum(axis=1) / counts.sum(axis=1, keepdims=True)
    found = [(below < share / 100).sum(axis=1) for share in QUANTILES]
    return np.stack(found, axis=1) * (FULL_DENSITY / 255)


def _relation(h: _Plane, e: _Plane) -> Floats:
    """Return haematoxylin's share of the stain, and the correlation of the stains at half resolution."""
    blueness = (h.mean + FAINT) / (h.mean + e.mean + 2 * FAINT)
    mixed = (h.pyramid[1] * e.pyramid[1]).mean(axis=(1, 2)) - h.mean * e.mean
    spread = np.maximum((h.power[1] - h.mean**2) * (e.power[1] - e.mean**2), 1e-8)
    return np.column_stack([blueness, mixed / np.sqrt(spread)])


def _nuclei(h: _Plane) -> Floats:
    """Return area, stain and evenness of the nuclei, survival of erosions, and counts at two scales."""
    half = h.pyramid[1]
    top = _quantiles(h.half_bytes)[:, QUANTILES.index(99)]
    threshold = np.clip(0.55 * top, 0.22, 0.5).astype(np.float32)[:, None, None]
    inside = half > threshold
    area = inside.mean(axis=(1, 2))
    share = np.maximum(area, 1e-4)
    amount = (half * inside).mean(axis=(1, 2)) / share
    spread = np.sqrt(np.maximum((half * half * inside).mean(axis=(1, 2)) / share - amount**2, 0))
    survival = np.sqrt(_survival(inside.view(np.uint8) * np.uint8(255)) / (255 * share + 1)[:, None])
    counts = [np.log1p(_count_peaks(h.pyramid[level], threshold)) for level in (1, 2)]
    return np.column_stack([area, amount, spread / (amount + FAINT), survival, *counts])


def _survival(planes: Bytes) -> NDArray[np.float64]:
    """Return (b, EROSIONS) means after 1, 2, ... erosions by 3 × 3; the border is cut, not padded."""
    means = []
    for _ in range(EROSIONS):
        rows = np.minimum(np.minimum(planes[:, :-2], planes[:, 1:-1]), planes[:, 2:])
        planes = np.minimum(np.minimum(rows[..., :-2], rows[..., 1:-1]), rows[..., 2:])
        means.append(planes.mean(axis=(1, 2)))
    return np.stack(means, axis=1)


def _count_peaks(plane: Floats, threshold: Floats) -> NDArray[np.float64]:
    """Return maxima of the smoothed plane per 1000 of its pixels."""
    smooth = _windowed(plane, np.add) * np.float32(1 / 9)
    highest, lowest = (_windowed(_windowed(smooth, extreme), extreme) for extreme in (np.maximum, np.minimum))
    middle = smooth[:, 2:-2, 2:-2]
    peaks = (middle == highest) & (middle > threshold) & (highest - lowest > FAINT)  # a plain field of ink has no peaks
    return np.asarray(peaks.mean(axis=(1, 2)) * 1000)


def _windowed(plane: Floats, combine: np.ufunc) -> Floats:
    """Combine each 3 × 3 window; one row and column are lost on each side."""
    rows = combine(combine(plane[:, :-2], plane[:, 1:-1]), plane[:, 2:])
    return np.asarray(combine(combine(rows[..., :-2], rows[..., 1:-1]), rows[..., 2:]))


def _cores(plane: _Plane) -> Floats:
    mean = plane.half_bytes.mean(axis=(1, 2))[:, None] + 255 * FAINT / FULL_DENSITY
    return np.asarray(_survival(plane.half_bytes)[:, 1::2] / mean, dtype=np.float32)


def _bands(plane: _Plane) -> Floats:
    """Return log energy, skewness and patchiness of the bands between successive levels of the pyramid."""
    energy = np.maximum(plane.power[:-1] - plane.power[1:], 1e-8)  # means of 2 x 2 are orthogonal projections
    relative = np.log10(energy / (plane.mean + FAINT) ** 2 + 1e-5)
    skewness, patchiness = [], []
    for level in range(1, BANDS):
        band = plane.pyramid[level] - _doubled(plane.pyramid[level + 1])
        square = band * band
        skewness.append((square * band).mean(axis=(1, 2)) / (energy[level] ** 1.5 + 1e-6))
        local = _blocks(square, 2 ** (BANDS - level))
        patchiness.append(local.std(axis=(1, 2)) / (energy[level] + 1e-4))
    return np.column_stack([*relative, *skewness, *patchiness]).astype(np.float32)


def _blocks(plane: Floats, side: int) -> Floats:
    """Return the means over side × side blocks."""
    for _ in range(side.bit_length() - 1):
        plane = _halved(plane)
    return plane


def _direction(plane: _Plane) -> Floats:
    """Return the mean gradient and the coherence of the structure tensor over blocks of 8 × 8 at half resolution."""
    half = plane.pyramid[1]
    dx = half[:, :-1, 1:] - half[:, :-1, :-1]
    dy = half[:, 1:, :-1] - half[:, :-1, :-1]
    rows, columns = (side // 8 * 8 for side in dx.shape[1:])
    xx, yy, xy = (_blocks(product[:, :rows, :columns], 8) for product in (dx * dx, dy * dy, dx * dy))
    strength = xx + yy
    coherence = np.hypot(xx - yy, 2 * xy).sum(axis=(1, 2)) / (strength.sum(axis=(1, 2)) + 1e-4)
    edge = np.sqrt(strength.mean(axis=(1, 2))) / (plane.mean + FAINT)
    return np.column_stack([edge, coherence])


def _patterns(plane: _Plane, level: int) -> Floats:
    """Return the histogram (b, 10) of the uniform local binary patterns of one level."""
    values = _to_bytes(plane.pyramid[level])
    height, width = values.shape[1:]
    centre = values[:, 1:-1, 1:-1]
    code = np.zeros(centre.shape, dtype=np.uint8)
    for bit, (dy, dx) in enumerate(((0, 0), (0, 1), (0, 2), (1, 2), (2, 2), (2, 1), (2, 0), (1, 0))):
        neighbour = values[:, dy : height - 2 + dy, dx : width - 2 + dx]
        code |= (neighbour > centre).view(np.uint8) << np.uint8(bit)
    bins = _UNIFORM[code]
    counts = [np.bincount(tile.ravel(), minlength=10) for tile in bins]
    return np.asarray(np.stack(counts) / centre[0].size, dtype=np.float32)


def _uniform_patterns() -> Bytes:
    """Return for each of 256 codes its number of ones, or 9 when ones and zeros alternate more than twice."""
    bits = (np.arange(256)[:, None] >> np.arange(8)) & 1
    changes = (bits != np.roll(bits, 1, axis=1)).sum(axis=1)
    return np.where(changes <= 2, bits.sum(axis=1), 9).astype(np.uint8)


def _unmixing() -> Floats:
    """Return (3, 3): optical density of R, G, B to haematoxylin, eosin (least squares) and the mean of R, G, B."""
    vectors = np.array(STAIN_VECTORS)
    amounts = np.linalg.pinv(vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).T
    return np.vstack([amounts, np.full(3, 1 / 3)]).astype(np.float32)


_FAMILIES: tuple[tuple[str, str, tuple[float, ...], tuple[float, ...]], ...] = (
    ("od_", "red green blue", (0.12, 0.36, 0.22), (0.082, 0.13, 0.081)),
    ("glass", "", (0.12,), (0.2,)),
    (
        "h_",
        "mean std q5 q25 q50 q75 q95 q99 contrast tail",
        (0.1, 0.15, 0.0, 0.01, 0.04, 0.09, 0.34, 0.85, 1.29, 1.66),
        (0.14, 0.12, 0.027, 0.07, 0.13, 0.23, 0.4, 0.44, 0.64, 0.59),
    ),
    (
        "e_",
        "mean std q5 q25 q50 q75 q95 q99 contrast tail",
        (0.31, 0.17, 0.01, 0.19, 0.32, 0.43, 0.59, 0.71, 0.44, 0.36),
        (0.13, 0.058, 0.084, 0.13, 0.17, 0.16, 0.16, 0.2, 0.66, 0.3),
    ),
    ("", "blueness overlap", (0.31, 0.01), (0.17, 0.31)),
    ("nuclei_", "area stain uneven", (0.04, 0.74, 0.21), (0.12, 0.23, 0.076)),
    ("nuclei_left_", "1 2 3 4 5 6", (0.48, 0.15, 0.06, 0.04, 0.03, 0.03), (0.18, 0.2, 0.2, 0.2, 0.2, 0.2)),
    ("nuclei_count_", "1 2", (1.0, 1.45), (0.7, 0.9)),
    ("h_core_", "2 4 6", (0.15, 0.07, 0.04), (0.14, 0.11, 0.096)),
    ("e_core_", "2 4 6", (0.53, 0.35, 0.23), (0.18, 0.19, 0.17)),
    ("h_band_", "0 1 2 3", (-1.35, -1.01, -0.78, -0.71), (0.4, 0.34, 0.34, 0.41)),
    ("h_skew_", "1 2 3", (0.37, 0.73, 0.9), (0.31, 0.52, 0.8)),
    ("h_patchy_", "1 2 3", (1.62, 1.89, 2.17), (0.72, 0.89, 1.0)),
    ("e_band_", "0 1 2 3", (-2.3, -1.91, -1.6, -1.48), (0.59, 0.49, 0.42, 0.4)),
    ("e_skew_", "1 2 3", (0.08, 0.01, -0.03), (0.27, 0.23, 0.27)),
    ("e_patchy_", "1 2 3", (0.88, 1.03, 1.34), (0.33, 0.37, 0.42)),
    ("h_", "edge directed", (0.68, 0.54), (0.28, 0.15)),
    ("e_", "edge directed", (0.24, 0.53), (0.21, 0.13)),
    (
        "h_lbp1_",
        "0 1 2 3 4 5 6 7 8 9",
        (0.13, 0.12, 0.07, 0.08, 0.08, 0.04, 0.04, 0.06, 0.03, 0.29),
        (0.13, 0.037, 0.025, 0.029, 0.034, 0.016, 0.014, 0.027, 0.019, 0.077),
    ),
    (
        "h_lbp2_",
        "0 1 2 3 4 5 6 7 8 9",
        (0.15, 0.12, 0.06, 0.06, 0.06, 0.03, 0.03, 0.07, 0.05, 0.33),
        (0.13, 0.037, 0.02, 0.029, 0.03, 0.018, 0.013, 0.027, 0.022, 0.085),
    ),
    (
        "e_lbp1_",
        "0 1 2 3 4 5 6 7 8 9",
        (0.08, 0.08, 0.07, 0.11, 0.17, 0.09, 0.05, 0.05, 0.03, 0.19),
        (0.14, 0.018, 0.015, 0.033, 0.066, 0.034, 0.019, 0.023, 0.017, 0.082),
    ),
)  # prefix, names, centres and scales: medians and spreads over normal and tumour tissue of several stainings

_DENSITY = np.log10(GLASS_LEVEL / np.maximum(np.arange(256), 1)).clip(0, None).astype(np.float32)
_UNMIX = _unmixing()
_UNIFORM = _uniform_patterns()
_CENTRE = np.array([value for *_, centres, _ in _FAMILIES for value in centres], np.float32)
_SCALE = np.array([value for *_, scales in _FAMILIES for value in scales], np.float32)

FEATURE_NAMES: tuple[str, ...] = tuple(
    prefix + name for prefix, names, *_ in _FAMILIES for name in names.split() or [""]
)
"""Names of the columns; order and number are stable within a `REVISION`."""
