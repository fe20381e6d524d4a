"""Which tiles of a slide a second model sees at a higher magnification: the selection of the two-stage method.

Li, Li, Gertych, Knudsen, Speier, Arnold, 2019, https://arxiv.org/abs/1905.13208; equations 3 and 4 of
`eosin.mil.methods.two_stage`, which has the rest of the method. Components and clusters of a slide with more than
10,000 tiles are fitted to that many, evenly spaced.
"""

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray
from sklearn.cluster import KMeans
from sklearn.decomposition import PCA

from eosin.errors import ConfigError
from eosin.wsi._grid import TileGrid, Tiling

FITTED_TILES = 10_000
RATIO_TOLERANCE = 0.02


def select_tiles(
    weights: NDArray[np.floating],
    features: NDArray[np.floating],
    *,
    budget: int,
    clusters: int = 4,
    components: int = 32,
    seed: int = 0,
) -> NDArray[np.int64]:
    """Choose tiles of one slide for the second stage, equation 3.

    Parameters
    ----------
    weights : (n,) float
        Attention of the first stage, at least 0.
    features : (n, D) float
    budget : int
        Most tiles to choose.
    clusters, components : int
        Of k-means and of the principal components; fewer where the slide has fewer tiles.
    seed : int
        Of both.

    Returns
    -------
    (min(budget, n),) int64
        Rows of the chosen tiles, cluster after cluster, the most salient cluster and tile first.

    Raises
    ------
    ConfigError
        If the budget is below 1 or there is not one weight per row.
    """
    if budget < 1:
        raise ConfigError(f"budget {budget}: pass 1 or more tiles")
    if weights.shape != (len(features),):
        raise ConfigError(f"{weights.shape} weights for {len(features)} tiles; pass one weight per tile")
    n = len(features)
    if n <= 1:
        return np.arange(n)
    cluster = _clustered(features, min(clusters, n), components, seed)
    numbers = np.unique(cluster)
    saliency = np.array([weights[cluster == number].mean() for number in numbers])
    order = np.argsort(-saliency, kind="stable")
    sizes = np.array([(cluster == number).sum() for number in numbers])
    quota = _quotas(saliency[order], sizes[order], min(budget, n))
    chosen = [
        _most_attended(weights, cluster == numbers[place], count) for place, count in zip(order, quota, strict=True)
    ]
    return np.concatenate(chosen).astype(np.int64)


def child_grid(parents: TileGrid, tiling: Tiling) -> TileGrid:
    """Return the tiles of a finer tiling that make up the tiles of a grid, equation 4.

    Parameters
    ----------
    parents : TileGrid
        Large tiles; children of several, where large tiles overlap, appear once.
    tiling : Tiling
        Of the small tiles, without overlap.

    Returns
    -------
    TileGrid
        Row-major.

    Raises
    ------
    ConfigError
        If a large tile is not a whole number of small ones along a side, or small tiles overlap.
    """
    ratio = tile_ratio(parents.tiling, tiling)
    delivered = tiling.delivered_mpp(parents.slide_mpp) / parents.slide_mpp
    side = max(1, round(tiling.patch_size * delivered))
    steps = np.rint(np.arange(ratio) * parents.tile_px0 / ratio).astype(np.int64)
    y, x = (grid.ravel() for grid in np.meshgrid(steps, steps, indexing="ij"))
    origins = (parents.origins_px0[:, None] + np.stack([x, y], 1)).reshape(-1, 2)
    origins = np.minimum(origins, np.array(parents.slide_size_px0) - side)  # rounding may push a tile over the edge
    rows = np.unique(origins[:, ::-1], axis=0)[:, ::-1] if len(origins) else origins
    return replace(parents, origins_px0=np.ascontiguousarray(rows), tile_px0=side, tiling=tiling)


def tile_ratio(large: Tiling, small: Tiling) -> int:
    """Return how many small tiles lie along a side of a large one; see `child_grid` for the errors."""
    if small.overlap:
        raise ConfigError(f"overlap {small.overlap}: tiles of the second stage must not overlap; pass 0")
    exact = large.mpp * large.patch_size / (small.mpp * small.patch_size)
    ratio = round(exact)
    if ratio < 1 or abs(exact / ratio - 1) > RATIO_TOLERANCE or small.mpp > large.mpp * (1 + RATIO_TOLERANCE):
        finest = [large.mpp * large.patch_size / small.patch_size / r for r in range(1, 17)]
        fitting = ", ".join(f"{mpp:.4g}" for mpp in finest if mpp <= large.mpp * (1 + RATIO_TOLERANCE))
        raise ConfigError(
            f"tiles of {large.patch_size} px at {large.mpp:g} µm/px cannot be cut into tiles of {small.patch_size} px "
            f"at {small.mpp:g} µm/px without a remainder; with this size, --mpp may be {fitting} ..."
        )
    return ratio


def _clustered(features: NDArray[np.floating], clusters: int, components: int, seed: int) -> NDArray[np.int32]:
    step = -(-len(features) // FITTED_TILES)
    sample = np.asarray(features[::step], np.float64)
    if not np.ptp(sample, axis=0).any():
        return np.zeros(len(features), np.int32)
    projection = PCA(min(components, *sample.shape), random_state=seed).fit(sample)
    reduced = projection.transform(sample)
    means = KMeans(min(clusters, len(np.unique(reduced, axis=0))), n_init=4, random_state=seed).fit(reduced)
    parts = [features[start : start + FITTED_TILES] for start in range(0, len(features), FITTED_TILES)]
    labels = [means.predict(projection.transform(np.asarray(part, np.float64))) for part in parts]
    return np.concatenate(labels).astype(np.int32)


def _quotas(saliency: NDArray[np.float64], sizes: NDArray[np.int64], budget: int) -> NDArray[np.int64]:
    """Share a budget among clusters, the most salient first."""
    total = saliency.sum()
    share = saliency / total if total > 0 else np.full(len(saliency), 1 / len(saliency))
    quota: NDArray[np.int64] = np.minimum(np.rint(budget * share).astype(np.int64), sizes)
    for place in range(len(quota)):  # what is left over goes to the next cluster that has room
        quota[place] += min(max(0, budget - quota.sum()), sizes[place] - quota[place])
    for place in reversed(range(len(quota))):  # rounding may have given out too many
        quota[place] -= min(max(0, quota.sum() - budget), quota[place])
    return quota


def _most_attended(weights: NDArray[np.floating], member: NDArray[np.bool_], count: int) -> NDArray[np.int64]:
    rows = np.flatnonzero(member)
    best: NDArray[np.int64] = rows[np.argsort(-weights[rows], kind="stable")[:count]]
    return best
