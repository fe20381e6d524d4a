"""Every registered aggregator gives every map that it should, or one sentence why not."""

import numpy as np
import pytest
import torch
from scenes import feature_bag, lattice

import eosin.mil.methods  # noqa: F401  (registers the methods)
from eosin.errors import ConfigError, UnknownNameError
from eosin.heatmaps._colour import scale_of
from eosin.heatmaps._maps import ATTRIBUTIONS, LOG_ODDS_REACH, first_map, map_slide
from eosin.mil.bags import PackedBags
from eosin.mil.slots import AGGREGATORS, AttentionOutput
from eosin.mil.subsets import Target

DIM = 8
CLASSES = ("normal", "benign", "tumour")
SMALL = {
    "additive": {"embed_dims": (8,), "hidden": 6, "head_dims": (6,)},
    "dtfd": {"embed_dims": (8,), "hidden": 6},
    "ilra": {"width": 8, "heads": 2},
    "mi_max": {"hidden": 6},
    "transformer": {"width": 8, "heads": 2, "feed_forward": 8},
    "varmil": {"embed_dims": (8,), "hidden": 6, "head_dim": 6},
    "patch_gcn": {"width": 4, "layers": 2, "neighbours": 3},
    "rrt": {"width": 8, "heads": 2, "cross_heads": 2, "regions": 2, "hidden": 6},
    "wikg": {"width": 8, "neighbours": 3},
    "abmil": {"embed_dims": (8,), "hidden": 6, "heads": 2},
    "acmil": {"width": 8, "hidden": 6, "branches": 3},
    "acmil_mha": {"width": 8, "heads": 2, "branches": 3},
    "clam_mb": {"width": 8, "hidden": 6},
    "clam_sb": {"width": 8, "hidden": 6},
    "downsampled": {"host": "abmil", "host_options": {"embed_dims": (8,), "hidden": 6}, "hidden": 6},
    "dsmil": {"hidden": 6},
    "gdat": {"width": 8, "heads": 2, "region_size": 2, "hidden": 6},
    "ins": {"width": 8, "projection": 4, "pooling": "max"},
    "lse": {"embed_dims": (8,)},
    "mambamil": {"width": 8, "d_state": 4, "hidden": 6},
    "max": {"embed_dims": (8,)},
    "mean": {"embed_dims": (8,)},
    "set_transformer": {"embed_dims": (8,), "width": 8, "heads": 2, "tokens": 3},
    "transmil": {"width": 8, "heads": 2, "landmarks": 4},
}
WITHOUT_ATTENTION = {"ins", "lse", "max", "mean", "mi_max"}
WITH_INSTANCE_LOGITS = {"additive", "dsmil", "ins", "mi_max"}
WITHOUT_WEIGHTS = {"dtfd", "ilra", "ins", "max", "mi_max", "wikg"}
WITH_ROLLOUT = {"gdat", "set_transformer", "transformer", "transmil"}


@pytest.fixture(scope="module")
def bag():
    grid = lattice(size_px0=(240, 160), slide_mpp=0.5, patch_size=40)
    return feature_bag(np.random.default_rng(0).normal(size=(grid.n_tiles, DIM)).astype(np.float32), grid)


def build(name, n_outputs=3):
    torch.manual_seed(1)
    return AGGREGATORS.build(name, DIM, n_outputs, options=SMALL.get(name, {})).double().eval()


def expected_absent(name):
    absent = set() if name not in WITHOUT_ATTENTION else {"attention"}
    absent |= set() if name in WITH_INSTANCE_LOGITS else {"instance_logit"}
    absent |= {"log_weight_gradient"} if name in WITHOUT_WEIGHTS else set()
    return absent | (set() if name in WITH_ROLLOUT else {"rollout"})


@pytest.mark.parametrize("name", AGGREGATORS)
def test_every_aggregator_gives_every_map_or_says_why_not(bag, name):
    model = build(name)
    found = map_slide(model, bag, classes=CLASSES)
    if name in SMALL:
        assert set(found.absent) == expected_absent(name)
    assert all(len(sentence.split()) > 4 for sentence in found.absent.values())
    kinds = [heatmap.kind for heatmap in found.maps]
    assert len(set(kinds)) == len(kinds)
    assert kinds[0] == "alone"
    assert first_map(model, bag, classes=CLASSES).kind == "alone"
    for attribution in set(ATTRIBUTIONS) - set(found.absent):
        assert any(kind.startswith(attribution) for kind in kinds)
    for family in {"gradient", "log_weight_gradient", "instance_logit"} - set(found.absent):
        assert {f"{family}_{class_name}" for class_name in CLASSES} <= set(kinds)
    assert len([kind for kind in kinds if kind.startswith("effect")]) == 3
    by_kind = {heatmap.kind: heatmap.values for heatmap in found.maps}
    for kind in {"attention", "rollout"} & set(kinds):
        assert by_kind[kind].sum() == pytest.approx(1)


@pytest.mark.parametrize("name", AGGREGATORS)
def test_effects_are_exact_for_every_aggregator(bag, name):
    model = build(name)
    values = torch.from_numpy(np.asarray(bag.features)).double()
    coords, places = torch.from_numpy(bag.grid.origins_px0), torch.from_numpy(bag.grid.places())

    @torch.no_grad()
    def says(keep):
        pack = PackedBags.pack([values[keep]], coords_px0=[coords[keep]], places=[places[keep]])
        return model(pack).logits[0].numpy()

    everything = np.arange(bag.n_instances)
    predicted = int(says(everything).argmax())
    target = Target(predicted)
    expected = [target.of(says(everything)) - target.of(says(np.delete(everything, i))) for i in everything]
    found = map_slide(model, bag, classes=CLASSES, wanted=["effect"])
    np.testing.assert_allclose(found.maps[0].values, expected, rtol=1e-7, atol=1e-10)
    assert CLASSES[predicted] in found.maps[0].label


@pytest.mark.parametrize("name", AGGREGATORS)
def test_the_evidence_of_a_tile_alone_is_the_model_on_that_tile(bag, name):
    model = build(name)
    values = torch.from_numpy(np.asarray(bag.features)).double()
    coords, places = torch.from_numpy(bag.grid.origins_px0), torch.from_numpy(bag.grid.places())
    found = map_slide(model, bag, classes=CLASSES, wanted=["alone"]).maps
    assert [heatmap.shows for heatmap in found] == ["alone"] * 3
    with torch.no_grad():
        each = range(bag.n_instances)
        packs = [PackedBags.pack([values[[i]]], coords_px0=[coords[[i]]], places=[places[[i]]]) for i in each]
        logits = np.stack([model(pack).logits[0].numpy() for pack in packs])
        whole = model(PackedBags.pack([values], coords_px0=[coords], places=[places])).logits[0].numpy()
    expected = Target(int(whole.argmax())).of(logits)
    np.testing.assert_allclose(found[0].values, expected, rtol=1e-7, atol=1e-10)


def test_every_kind_of_map_says_what_it_is_relative_to(bag):
    for name in ("abmil", "dsmil", "transmil"):
        for heatmap in map_slide(build(name), bag, classes=CLASSES).maps:
            assert ", relative to " in heatmap.caption
            assert scale_of(heatmap).title == heatmap.caption


@pytest.mark.parametrize("name", ["abmil", "set_transformer", "ins"])
def test_two_classes_are_one_question(bag, name):
    kinds = [heatmap.kind for heatmap in map_slide(build(name, 1), bag, classes=("normal", "tumour")).maps]
    assert len([kind for kind in kinds if kind.startswith("gradient")]) == 1
    assert kinds.count("effect") == 1


@pytest.mark.parametrize("name", ["abmil", "mean", "transmil"])
def test_outputs_of_other_tasks_are_themselves_the_question(bag, name):
    model = build(name, 2)
    found = map_slide(model, bag, outputs=("risk", "age"))
    by_kind = {heatmap.kind: heatmap for heatmap in found.maps}
    assert by_kind["effect"].label == "what a tile adds to risk"
    assert by_kind["effect_age"].label == "what a tile adds to age"
    assert {"gradient_risk", "gradient_age"} <= set(by_kind)


def test_branches_belong_to_classes_or_to_heads(bag):
    kinds = {name: [heatmap.kind for heatmap in map_slide(build(name), bag, classes=CLASSES).maps] for name in SMALL}
    for name in ("clam_mb", "dsmil"):
        assert {"attention_normal", "attention_benign", "attention_tumour"} <= set(kinds[name])
    for name in ("acmil", "acmil_mha"):
        branches = [kind for kind in kinds[name] if kind.startswith("attention_branch")]
        assert branches == [f"attention_branch {branch}" for branch in range(3)]


def test_large_bags_of_models_that_are_run_again_are_estimated_on_demand():
    grid = lattice(size_px0=(1200, 720), slide_mpp=0.5, patch_size=40)
    bag = feature_bag(np.random.default_rng(0).normal(size=(grid.n_tiles, DIM)).astype(np.float32), grid)
    model = build("gdat")
    assert grid.n_tiles > 500
    assert "ask for the map effect" in map_slide(model, bag, classes=CLASSES).absent["effect"]
    (first, *_) = map_slide(model, bag, classes=CLASSES, wanted=["effect"], budget=20_000).maps
    assert first.kind == "effect_estimate"
    assert "rank correlation with exact effects" in first.label


def test_what_cannot_be_asked_for(bag):
    with pytest.raises(UnknownNameError, match="no map named 'saliency'"):
        map_slide(build("abmil"), bag, wanted=["saliency"])
    with pytest.raises(ConfigError, match="has no attention"):
        map_slide(build("mean"), bag, wanted=["attention"])


def test_what_is_expected_covers_the_registry():
    assert set(SMALL) >= set(AGGREGATORS) - {"owlora"}  # which wraps any of them
    without = {name for name in AGGREGATORS if not issubclass(build(name).output_type, AttentionOutput)}
    assert without == WITHOUT_ATTENTION


@pytest.mark.parametrize("sign", [-1.0, 1.0])
def test_of_two_classes_every_slide_shows_the_second(bag, sign):
    model = build("abmil", n_outputs=2)
    with torch.no_grad():
        model.classifier.bias.copy_(torch.tensor([-10.0, 10.0]) * sign)  # predicts the one class or the other
    maps = map_slide(model, bag, classes=("normal", "tumour"))
    assert maps.maps[0].label == "the log-odds of tumour of the tile alone"
    assert (np.sign(maps.maps[0].values) == sign).all()


def test_evidence_has_one_scale_over_all_slides(bag):
    heatmap = first_map(build("abmil"), bag, classes=CLASSES)
    scale = scale_of(heatmap)
    assert (scale.low, scale.high) == (-LOG_ODDS_REACH, LOG_ODDS_REACH)
    assert scale_of(heatmap.percentile()).high == 100


def test_a_model_that_must_be_run_on_every_tile_shows_attention_on_large_slides(bag, monkeypatch):
    monkeypatch.setattr("eosin.heatmaps._maps.MANY_TILES", bag.n_instances - 1)
    model = build("transmil")
    assert first_map(model, bag, classes=CLASSES).kind == "attention_percentile"
    assert "by itself" in map_slide(model, bag, classes=CLASSES).absent["alone"]
