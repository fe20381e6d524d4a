import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from scenes import random_bag

from eosin.heatmaps._counterfactual import (
    Effect,
    ablate_top,
    certify,
    intervene,
    smallest_necessary,
    smallest_sufficient,
    tile_effects,
    top_tiles,
    transplant,
)
from eosin.heatmaps._findings import effects_table, in_words
from eosin.mil._closed_forms import MaxBag, PooledBag
from eosin.mil._reevaluation import ForwardBag
from eosin.mil.bags import PackedBags
from eosin.mil.methods.pooling import MeanPooling
from eosin.mil.subsets import Target

TUMOUR = Target(1)


@pytest.fixture
def slide():
    """100 tiles; four of them say tumour loudly and get most of the attention."""
    rng = np.random.default_rng(0)
    terms = np.zeros((100, 1, 2))
    terms[:, 0, 1] = -1 + 0.1 * rng.normal(size=100)
    scores = 0.1 * rng.normal(size=(100, 1))
    terms[:4, 0, 1], scores[:4] = 6.0, 4.0
    return PooledBag(scores, terms, np.zeros(2))


def test_removing_what_matters_turns_the_prediction_and_random_tiles_do_not(slide):
    effect = intervene(slide, TUMOUR, np.arange(4), kind="remove", what="marked tiles")
    assert effect.before > 0 > effect.after
    assert not effect.is_still_predicted
    assert effect.control_mean == pytest.approx(effect.before, abs=0.5)
    assert effect.control_low <= effect.control_mean <= effect.control_high
    assert effect.control_rank == pytest.approx(1 / 51)
    assert effect.n_controls == 50


def test_keeping_what_matters_is_enough(slide):
    effect = intervene(slide, TUMOUR, np.arange(4), kind="keep only", what="marked tiles")
    assert effect.is_still_predicted
    assert effect.after > effect.before
    assert effect.after == pytest.approx(6.0)


def test_harmless_tiles_are_like_random_ones(slide):
    effect = intervene(slide, TUMOUR, np.array([50, 60, 70]), kind="remove", what="some tiles", controls=200)
    assert effect.control_rank > 0.05
    again = intervene(slide, TUMOUR, np.array([50, 60, 70]), kind="remove", what="some tiles", controls=200)
    assert effect == again


def test_transplanted_tumour_is_found(slide):
    normal = slide.select(np.arange(10, 90))
    effect = transplant(normal, slide, TUMOUR, np.arange(4), what="tumour tiles")
    assert effect.before < 0 < effect.after
    assert effect.after == pytest.approx(float(TUMOUR.of(normal.join(slide.select(range(4))).logits())))
    assert effect.control_rank < 0.1


@pytest.mark.parametrize(
    ("n", "fraction", "expected"), [(30, 0.01, 1), (30, 0.05, 2), (30, 0.2, 6), (100, 0.01, 1), (0, 0.1, 0)]
)
def test_fraction_is_rounded_up(n, fraction, expected):
    assert len(top_tiles(np.arange(n, dtype=float), fraction)) == expected


def test_top_tiles_are_the_highest_first():
    assert top_tiles(np.array([1.0, 5.0, 3.0, 5.0]), 0.75).tolist() == [1, 3, 2]


def test_ablation_removes_and_keeps_each_fraction(slide):
    effects = ablate_top(slide, TUMOUR, slide.attention[:, 0], name="most attended", fractions=(0.01, 0.04), controls=5)
    assert [(effect.kind, effect.n_tiles) for effect in effects] == [
        ("remove", 1), ("keep only", 1), ("remove", 4), ("keep only", 4),
    ]  # fmt: skip
    assert effects[0].is_still_predicted
    assert not effects[2].is_still_predicted
    assert effects[2].what == "4 % most attended tiles"
    table = effects_table(effects, {"slide": "s"})
    assert table.slide.tolist() == ["s"] * 4
    np.testing.assert_allclose(table.change, table.log_odds_after - table.log_odds_before)


@pytest.mark.parametrize("seed", range(5))
def test_smallest_necessary_set_is_the_smallest_of_all(seed):
    bag = random_bag(10, spread=1.5, seed=seed)
    bag = PooledBag(bag.scores, bag.terms, np.array([0.0, 0.3 - float(TUMOUR.of(bag.logits() - bag.bias))]))
    assert float(TUMOUR.of(bag.logits())) == pytest.approx(0.3)
    found = smallest_necessary(bag, TUMOUR, bag.greedy(TUMOUR, "min", 9))
    sizes = [
        size
        for size in range(1, 10)
        if any(float(TUMOUR.of(bag.remove(list(c)))) <= 0 for c in itertools.combinations(range(10), size))
    ]
    if not sizes:
        assert found is None
    else:
        assert found is not None
        assert found.is_certain
        assert len(found.tiles) == sizes[0]
        assert float(TUMOUR.of(bag.remove(found.tiles))) <= 0


def test_with_several_branches_the_smallest_set_is_the_searchs_and_says_so():
    bag = random_bag(30, branches=3, seed=2)
    bag = PooledBag(bag.scores, bag.terms, np.array([0.0, 0.2 - float(TUMOUR.of(bag.logits() - bag.bias))]))
    found = smallest_necessary(bag, TUMOUR, bag.greedy(TUMOUR, "min", 29))
    assert found is not None
    assert not found.is_certain
    assert float(TUMOUR.of(bag.remove(found.tiles))) <= 0 < float(TUMOUR.of(bag.remove(found.tiles[:-1])))


def test_certificate_bounds_the_search():
    bag = random_bag(60, spread=2.0, seed=4)
    greedy, best = certify(bag, TUMOUR, bag.greedy(TUMOUR, "min", 12))
    assert best <= greedy + 1e-12


@pytest.mark.parametrize(
    ("effect", "expected"),
    [
        (
            Effect("remove", "1 % most attended tiles", 7, 5.8, 4.4),
            "Without the 1 % most attended tiles (7) the model still says tumour: 0.997 → 0.988.",
        ),
        (
            Effect("remove", "marked tiles", 4, 9.0, -9.0, 8.0, 7.0, 9.0, 0.0196, 50),
            "Without the marked tiles (4) the model no longer says tumour: > 0.999 → < 0.001; "
            "with as many random tiles > 0.999 (p = 0.02).",
        ),
        (
            Effect("add", "tumour tile", 1, -6.0, 1.5),
            "With the tumour tile added (1) the model now says tumour: 0.002 → 0.818.",
        ),
        (
            Effect("keep only", "region", 9, -1.0, -2.0),
            "With the region alone (9) the model still does not say tumour: 0.269 → 0.119.",
        ),
    ],
)
def test_effects_read_as_sentences(effect, expected):
    assert in_words(effect, "tumour") == expected


@pytest.mark.parametrize("outputs", [1, 2, 3])
def test_tile_effects_are_what_each_tile_adds(outputs):
    bag = random_bag(12, branches=2, outputs=outputs, seed=1)
    target = Target(0)
    effects, agreement = tile_effects(bag, target)
    full = float(target.of(bag.logits()))
    np.testing.assert_allclose(effects, [full - float(target.of(bag.remove([i]))) for i in range(12)], atol=1e-12)
    assert agreement == 1


def test_tile_effects_of_other_models_say_how_far_to_trust_them():
    torch.manual_seed(0)
    values = torch.randn(80, 6, dtype=torch.float64)
    model = MeanPooling(6, 2, embed_dims=(16,), dropout=0.0).double().eval()
    effects, agreement = tile_effects(ForwardBag(model, PackedBags.pack([values])), TUMOUR)
    assert effects.shape == (80,)
    assert 0.8 < agreement <= 1


@pytest.mark.parametrize("seed", range(6))
def test_one_tile_suffices_or_none_does_for_a_linear_model(seed):
    bag = random_bag(7, spread=1.5, seed=seed)
    bag = PooledBag(bag.scores, bag.terms, np.array([3.0 - seed, 0.0]))
    found = smallest_sufficient(bag, TUMOUR, tile_effects(bag, TUMOUR)[0])
    sets = [chosen for size in range(1, 8) for chosen in itertools.combinations(range(7), size)]
    sufficient = [chosen for chosen in sets if TUMOUR.of(bag.keep_only(list(chosen))) > 0]
    assert (found is None) == (not sufficient)
    if found is not None:
        assert found.is_certain
        assert len(found.tiles) == len(sufficient[0]) == 1
        assert TUMOUR.of(bag.keep_only(found.tiles)) > 0


@pytest.mark.parametrize("n", [1, 2, 7, 8, 9, 40])
def test_sufficient_set_of_other_models_is_the_first_that_does(n):
    rng = np.random.default_rng(n)
    counts = MaxBag(
        torch.from_numpy(np.eye(n)), torch.stack([torch.zeros(n), torch.ones(n)]).double(), torch.zeros(2).double()
    )
    needed = n // 2
    bag = replace(
        counts, bias=torch.tensor([needed + 0.5, 0.0], dtype=torch.float64)
    )  # tumour from needed + 1 tiles on
    effects = rng.normal(size=n)
    found = smallest_sufficient(bag, TUMOUR, effects)
    if n == needed:
        assert found is None
    else:
        assert found.tiles.tolist() == np.argsort(-effects)[: needed + 1].tolist()
        assert found.is_certain == (needed == 0)
    impossible = replace(counts, bias=torch.tensor([n + 1.0, 0.0], dtype=torch.float64))
    assert smallest_sufficient(impossible, TUMOUR, effects) is None


def test_best_set_to_raise_is_never_worse_than_the_search():
    bag = random_bag(60, seed=2)
    search = bag.greedy(TUMOUR, "max", 12)
    greedy, best = certify(bag, TUMOUR, search, direction="max")
    assert best >= greedy > float(TUMOUR.of(bag.logits()))


def test_effect_size_is_in_deviations_of_the_controls(slide):
    effect = intervene(slide, TUMOUR, np.arange(4), kind="remove", what="loud tiles", controls=40)
    assert effect.effect_size == pytest.approx((effect.after - effect.control_mean) / effect.control_sd)
    assert effect.effect_size < -3
    assert intervene(slide, TUMOUR, np.arange(4), kind="remove", what="loud", controls=0).effect_size is None
    table = effects_table([effect])
    assert table.effect_size[0] == effect.effect_size
