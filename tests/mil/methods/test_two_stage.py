import numpy as np
import pytest
import torch

from eosin.errors import ConfigError
from eosin.mil._selection import child_grid, select_tiles
from eosin.mil.bags import PackedBags
from eosin.mil.methods.pooling import MeanPooling
from eosin.mil.methods.two_stage import InstanceDropout
from eosin.mil.tasks._classification import Classification
from eosin.wsi._grid import TileGrid, Tiling

TASK = Classification(classes=("a", "b"))


def slide():
    """Three groups of tiles far apart: 10 with weight 6, 20 with weight 3, 30 with weight 1, all slightly different."""
    rng = np.random.default_rng(0)
    group = rng.permutation(np.repeat([0, 1, 2], [10, 20, 30]))
    features = rng.normal(size=(60, 40)) + 50 * np.eye(3, 40)[group]
    return np.array([6.0, 3.0, 1.0])[group] + rng.uniform(0, 1e-3, 60), features, group


def test_clusters_share_the_budget_by_their_mean_weight():
    weights, features, group = slide()
    chosen = select_tiles(weights, features, budget=10, clusters=3)
    assert np.bincount(group[chosen]).tolist() == [6, 3, 1]
    for number in range(3):
        mine = chosen[group[chosen] == number]
        best = np.flatnonzero(group == number)[np.argsort(-weights[group == number])][: len(mine)]
        assert mine.tolist() == best.tolist()
    assert select_tiles(weights, features, budget=10, clusters=3).tolist() == chosen.tolist()


def test_what_a_small_cluster_cannot_give_goes_to_the_next():
    weights, features, group = slide()
    assert np.bincount(group[select_tiles(weights, features, budget=30, clusters=3)]).tolist() == [10, 17, 3]
    assert sorted(select_tiles(weights, features, budget=500, clusters=3)) == list(range(60))


def test_rounding_takes_from_the_least_salient():
    features = 50 * np.repeat(np.eye(3), 5, axis=0) + np.arange(15)[:, None] * 1e-3
    weights = np.repeat([2.6, 0.7, 0.69], 5)
    chosen = select_tiles(weights, features, budget=4, clusters=3)  # 2.6, 0.7 and 0.69 of 4 round to 3, 1 and 1
    assert np.bincount(chosen // 5, minlength=3).tolist() == [3, 1, 0]


@pytest.mark.parametrize("budget", [1, 2, 3, 7])
def test_the_budget_is_spent_exactly(budget):
    rng = np.random.default_rng(budget)
    chosen = select_tiles(rng.random(20), rng.normal(size=(20, 3)), budget=budget)
    assert len(set(chosen)) == len(chosen) == budget


def test_slides_with_hardly_a_tile_are_defined():
    assert select_tiles(np.zeros(0), np.zeros((0, 4)), budget=3).tolist() == []
    assert select_tiles(np.ones(1), np.zeros((1, 4)), budget=3).tolist() == [0]
    assert sorted(select_tiles(np.zeros(5), np.ones((5, 4)), budget=3)) == [0, 1, 2]  # all tiles alike, no attention


def test_small_tiles_cover_the_large_one():
    large, small = Tiling(mpp=1.0, patch_size=256), Tiling(mpp=0.5, patch_size=256)
    parents = TileGrid(np.array([[0, 0], [512, 1024]]), 512, large, (4096, 4096), 0.5)
    assert child_grid(parents, small).origins_px0.tolist() == [
        [0, 0], [256, 0], [0, 256], [256, 256],
        [512, 1024], [768, 1024], [512, 1280], [768, 1280],
    ]  # fmt: skip
    assert child_grid(parents, large).origins_px0.tolist() == parents.origins_px0.tolist()
    with pytest.raises(ConfigError, match="without a remainder"):
        child_grid(parents, Tiling(mpp=0.7, patch_size=256))


def test_dropped_instances_become_the_mean_and_stay_counted():
    torch.manual_seed(0)
    bags = PackedBags.pack([torch.ones(2000, 3), torch.ones(1, 3)])
    strategy = InstanceDropout(MeanPooling(3, 2, embed_dims=()), TASK, p=0.25)
    step = strategy(bags, torch.zeros(2))
    assert step.bags.lengths == bags.lengths
    assert set(step.bags.values.unique().tolist()) <= {0.0, 1.0}
    assert step.bags.values[:2000].mean() == pytest.approx(0.75, abs=0.04)
    assert (step.bags.values == step.bags.values[:, :1]).all()
    torch.testing.assert_close(step.output.embedding[0], step.bags.values[:2000].mean(0))


def test_what_makes_no_sense_is_refused():
    with pytest.raises(ConfigError, match=r"p: .* must be less than 1"):
        InstanceDropout(MeanPooling(3, 2), TASK, p=1.0)
    with pytest.raises(ConfigError, match="budget 0"):
        select_tiles(np.ones(2), np.ones((2, 2)), budget=0)
    with pytest.raises(ConfigError, match="one weight per tile"):
        select_tiles(np.ones(3), np.ones((2, 2)), budget=1)
