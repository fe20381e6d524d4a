import numpy as np
import pytest
import torch
from scenes import feature_bag, lattice

from eosin.errors import ConfigError
from eosin.heatmaps._maps import attention_map, attention_weights, attribution_maps, gradient_map
from eosin.heatmaps._subject import pack_bag
from eosin.mil.methods.abmil import Abmil
from eosin.mil.methods.clam import ClamMultiBranch
from eosin.mil.methods.pooling import MeanPooling
from eosin.mil.slots import class_names
from eosin.mil.subsets import Target

DIM = 12


@pytest.fixture
def grid():
    return lattice(size_px0=(640, 480), slide_mpp=0.5, patch_size=40)


@pytest.fixture
def bag(grid):
    return feature_bag(np.random.default_rng(0).normal(size=(grid.n_tiles, DIM)).astype(np.float16), grid)


def abmil(**options):
    torch.manual_seed(0)
    return Abmil(DIM, 2, embed_dims=(8,), hidden=6, **options)


def test_weights_are_those_that_the_model_pools_with(bag):
    model = abmil(heads=3)
    weights = attention_weights(model, bag)
    assert weights.shape == (bag.n_instances, 3)
    np.testing.assert_allclose(weights.sum(0), 1)
    output = model.eval()(pack_bag(model, bag))
    pooled = weights.T @ output.instances.detach().double().numpy()  # (H, E)
    np.testing.assert_allclose(pooled.ravel(), output.embedding[0].detach().numpy(), atol=1e-5)


def test_attention_stays_with_the_tile_it_belongs_to(bag, grid):
    model = abmil()
    features = bag.features.astype(np.float32)
    top = int(attention_map(model, bag).values.argmax())
    tile = (top + 77) % grid.n_tiles
    features[[top, tile]] = features[[tile, top]]
    moved = attention_map(model, feature_bag(features, grid))
    assert moved.values.argmax() == tile
    assert moved.percentile().values[tile] == 100
    x0, y0, x1, y1 = grid.boxes_px0()[tile]
    assert moved.raster(0.5)[y0:y1, x0:x1].min() == np.nanmax(moved.raster(0.5))


def test_mean_and_branches(bag):
    model = abmil(heads=2)
    weights = attention_weights(model, bag)
    np.testing.assert_allclose(attention_map(model, bag).values, weights.mean(1))
    np.testing.assert_allclose(attention_map(model, bag, branch=1).values, weights[:, 1])
    maps = attribution_maps(model, bag, classes=("normal", "tumour"))
    assert [heatmap.label for heatmap in maps] == ["attention", "attention of branch 0", "attention of branch 1"]
    with pytest.raises(ConfigError, match="branches 0 to 1"):
        attention_map(model, bag, branch=2)


def test_branch_per_class_is_named_by_class(bag):
    torch.manual_seed(0)
    maps = attribution_maps(ClamMultiBranch(DIM, 2, width=8, hidden=6), bag, classes=("normal", "tumour"))
    assert [heatmap.kind for heatmap in maps] == ["attention", "attention_normal", "attention_tumour"]


def test_model_is_left_in_its_mode_and_dropout_is_off(bag):
    model = abmil(dropout=0.5).train()
    first, second = (attention_weights(model, bag) for _ in range(2))
    np.testing.assert_array_equal(first, second)
    assert model.training


def test_model_without_attention_is_refused(bag):
    with pytest.raises(ConfigError, match="has no attention"):
        attention_map(MeanPooling(DIM, 2), bag)


def test_features_without_places_are_refused(bag):
    with pytest.raises(ConfigError, match="no tile coordinates"):
        attention_map(abmil(), feature_bag(np.asarray(bag.features), None))


@pytest.mark.parametrize("n", [0, 1])
def test_smallest_bags(bag, grid, n):
    heatmap = attention_map(abmil(), feature_bag(np.asarray(bag.features)[:n], grid.select(np.arange(n))))
    assert heatmap.values.tolist() == [1.0] * n


@pytest.mark.parametrize(
    ("n_outputs", "classes", "expected"),
    [(2, ("a", "b"), ["a", "b"]), (1, ("a", "b"), ["b"]), (2, (), ["output 0", "output 1"])],
)
def test_outputs_are_named_by_class(n_outputs, classes, expected):
    assert class_names(n_outputs, classes) == expected


def test_gradients_of_a_linear_model_sum_to_its_logit(bag):
    torch.manual_seed(0)
    model = MeanPooling(DIM, 2, embed_dims=()).train()
    heatmap = gradient_map(model, bag, Target(1, "logit"), of="tumour")
    logit = model.eval()(pack_bag(model, bag)).logits[0, 1].item()
    assert heatmap.values.sum() == pytest.approx(logit - model.classifier.bias[1].item(), rel=1e-4)
    assert heatmap.signed
    assert heatmap.label == "gradient times input of tumour"


def test_gradient_is_the_slope_of_the_target(bag, grid):
    model = abmil().double()
    target = Target(1)
    heatmap = gradient_map(model, bag, target, of="tumour")
    step, tile = 1e-4, 5
    outputs = []
    for factor in (1 - step, 1 + step):
        pack = pack_bag(model, bag)
        pack.values[tile] *= factor
        outputs.append(float(target.of(model.eval()(pack).logits[0].detach().numpy())))
    assert heatmap.values[tile] == pytest.approx((outputs[1] - outputs[0]) / (2 * step), rel=1e-5)
