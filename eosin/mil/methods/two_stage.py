"""Two stages: attention at a low magnification chooses the tiles that a second model sees at a higher one.

Li, Li, Gertych, Knudsen, Speier, Arnold: An attention-based multi-resolution model for prostate whole slide image
classification and localization, 2019, https://arxiv.org/abs/1905.13208.

1. Both stages: ``a = softmax(w tanh(V h))``, ``z = Σ a h``, ``logits = W z + b``; cross-entropy.
2. Instance dropout (strategy `instance_dropout`): in training each tile is replaced, with probability p, by the mean
   of the data, so that the number of tiles stays the same.
3. Selection (`select_tiles`): principal components of a slide's features, k-means, saliency of a cluster = its mean
   weight ``ā_c``; of a budget B cluster c gives ``round(B ā_c / Σ ā)`` tiles, at most its own number, what is left
   over goes to the next most salient; within a cluster the most attended first.
4. A tile at the low magnification covers ratio × ratio tiles at the higher one (`children_px0`, `child_grid`).

``eosin run --recipe two_stage`` goes the whole way; ``eosin tile --from RUN --mpp 1.0 --budget 64`` is the step between
the stages. Both take care that the tiles of a slide are chosen by first-stage models that have not seen its patient:
a model that has been trained on a slide attends there to what it remembers, and the second stage would learn from that.

Deviations from the authors. The constants (p = ½, 32 components, 4 clusters) are not printed in what could be read and
are options. The mean of the data is 0 in standardized features, which is what replaces a tile here; the authors
replace pixels before their network. The number of tiles changes a raw weight, but neither quotas nor ranks within a
slide. Features are frozen in both stages; the authors train their networks end to end. The second stage reads every
slide: a slide that the first one misses is not lost, and benign is a class like others. The authors grade only what
the first calls cancer. Components and clusters of a slide with more than 10,000 tiles are fitted to that many, evenly
spaced.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.cluster import KMeans
from sklearn.decomposition import PCA
from torch import Tensor

from eosin.errors import ConfigError
from eosin.mil.bags import PackedBags
from eosin.mil.recipe import RECIPES, Component, Recipe, Training
from eosin.mil.slots import STRATEGIES, Aggregator, Step, Strategy
from eosin.mil.tasks import Task
from eosin.wsi.grid import TileGrid, Tiling

FITTED_TILES = 10_000
RATIO_TOLERANCE = 0.02


@STRATEGIES.register("instance_dropout")
class InstanceDropout(Strategy):
    """Replace instances by the mean of the standardized features while training, equation 2.

    Parameters
    ----------
    model : Aggregator
    task : Task
    p : float
        Chance of an instance to be replaced.
    """

    def __init__(self, model: Aggregator, task: Task, *, p: float = 0.5) -> None:
        super().__init__(model, task)
        if not 0 <= p < 1:
            raise ConfigError(f"instance_dropout: p {p} must be at least 0 and below 1")
        self.p = p

    def forward(self, bags: PackedBags, target: Tensor) -> Step:
        """Replace and run the model."""
        keep = torch.rand(bags.n_instances, 1, device=bags.values.device) >= self.p
        dropped = bags.with_values(bags.values * keep)
        return Step(self.model(dropped), dropped)


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
        raise ConfigError(f"budget {budget}: at least one tile must be chosen")
    if weights.shape != (len(features),):
        raise ConfigError(f"{weights.shape} weights for {len(features)} tiles; give one per tile")
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


def children_px0(origins_px0: NDArray[np.int64], *, tile_px0: int, ratio: int = 2) -> NDArray[np.int64]:
    """Return the tiles that make up larger ones, equation 4.

    Parameters
    ----------
    origins_px0 : (n, 2) int64
        Top-left corners, x then y, level-0 pixels.
    tile_px0 : int
        Side of a large tile; `ratio` divides it.
    ratio : int
        Small tiles along a side of a large one.

    Returns
    -------
    (n * ratio², 2) int64
        Their top-left corners, row by row within each large tile.
    """
    if ratio < 1 or tile_px0 % ratio:
        raise ConfigError(f"tiles of {tile_px0} px cannot be cut into {ratio} along a side without a remainder")
    steps = np.arange(ratio) * (tile_px0 // ratio)
    y, x = (grid.ravel() for grid in np.meshgrid(steps, steps, indexing="ij"))
    small = origins_px0[:, None] + np.stack([x, y], 1)
    return small.reshape(-1, 2)


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
    return TileGrid(np.ascontiguousarray(rows), side, tiling, parents.slide_size_px0, parents.slide_mpp)


def tile_ratio(large: Tiling, small: Tiling) -> int:
    """Return how many small tiles lie along a side of a large one; see `child_grid` for the errors."""
    if small.overlap:
        raise ConfigError(f"overlap {small.overlap}: the tiles of the second stage cover those of the first; give 0")
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


RECIPE = Recipe(
    aggregator=Component(name="abmil", options={"gated": False, "dropout": 0.0}),
    strategy=Component(name="instance_dropout"),
    training=Training(optimizer="adam", lr=1e-4, weight_decay=1e-5, epochs=50, patience=10, schedule="constant"),
)
RECIPES.add("two_stage", RECIPE)
