import pytest
import torch
from planted import (
    DATASETS,
    Planted,
    false_frequency,
    multi_concept,
    planted_signal,
    single_concept,
)

from eosin.errors import ConfigError
from eosin.mil._evaluate import predict_outputs
from eosin.mil._recipe import RECIPES, Component, Training
from eosin.mil._train import fit
from eosin.mil.slots import AGGREGATORS
from eosin.mil.tasks._classification import Binary, Classification

POISON = -9.0


def bags_of(data: Planted):
    names = data.examples.ids
    return [(data.examples.bags.load(name), data.planted[name], n % 2) for n, name in enumerate(names)]


@pytest.mark.parametrize("name", list(DATASETS))
def test_bags_are_drawn_again_alike_and_every_positive_one_is_planted(name):
    first, again = (DATASETS[name](6, part="train", seed=3) for _ in range(2))
    other = DATASETS[name](6, part="test", seed=3)
    for (bag, planted, label), (same, _, _), (fresh, _, _) in zip(*map(bags_of, (first, again, other)), strict=True):
        assert torch.equal(bag, same)
        assert not torch.equal(bag[:1], fresh[:1])
        assert len(planted) == len(bag)
        assert planted.any() or not label
    assert first.examples.targets.tolist() == [0, 1, 0, 1, 0, 1]


@pytest.mark.parametrize("make", [single_concept, multi_concept])
def test_the_poison_changes_sides(make):
    for part, poisoned in (("train", 0), ("test", 1)):
        for bag, planted, label in bags_of(make(40, part=part)):
            poison = bag.mean(1) < POISON
            assert poison.sum() == (label == poisoned)
            assert not (poison & planted).any()


def test_one_kind_of_instance_makes_a_bag_positive():
    for _, planted, label in bags_of(single_concept(60, part="train", background=7)):
        assert int(planted.sum()) in (range(1, 5) if label else (0,))
        assert int((~planted).sum()) == 7 + (1 - label)


def concepts(bag, planted):
    return [int((bag[planted].mean(1).round() == mean).sum()) for mean in (2, 3)]


def test_two_kinds_make_a_bag_positive_only_together():
    seen = set()
    for bag, planted, label in bags_of(multi_concept(60, part="train")):
        two, three = concepts(bag, planted)
        assert (two == three and 1 <= two <= 4) if label else two + three == 1
        seen.add((two > 0, three > 0))
    assert seen == {(True, True), (True, False), (False, True)}


def test_many_of_one_kind_make_no_bag_positive():
    for part, negative in (("train", range(1, 3)), ("test", range(35, 46))):
        for bag, planted, label in bags_of(false_frequency(60, part=part)):
            two, three = concepts(bag, planted)
            if label:
                assert two in (1, 2)
                assert three in (1, 2)
            else:
                assert max(two, three) in negative
                assert min(two, three) == 0


def test_the_signal_is_as_rare_and_as_strong_as_asked():
    options = {"dim": 64, "lengths": (400, 900), "fraction": 0.02, "shift": 1.0, "distractors": 0.05}
    lengths = set()
    for bag, planted, label in bags_of(planted_signal(12, part="train", **options)):
        lengths.add(len(bag))
        assert 400 <= len(bag) <= 900
        assert planted.sum() == label * round(0.02 * len(bag))
    assert len(lengths) > 6
    one = planted_signal(2, part="train", fraction=0.001, lengths=(50, 50))
    assert one.planted["train00001"].sum() == 1
    strong = planted_signal(2, part="train", dim=64, fraction=0.5, shift=30.0)
    bag, planted = strong.examples.bags.load("train00001"), strong.planted["train00001"]
    distance = (bag[planted].mean(0) - bag[~planted].mean(0)).square().mean().sqrt()
    assert 27 < distance < 33


def test_the_share_of_the_signal_may_differ_between_bags():
    drawn = planted_signal(80, part="train", dim=2, lengths=(1000, 1000), fraction=(0.01, 0.16))
    shares = torch.tensor([float(planted.float().mean()) for _, planted, label in bags_of(drawn) if label])
    assert 0.01 <= shares.min() < 0.015
    assert 0.11 < shares.max() <= 0.16
    assert 0.025 < shares.median() < 0.065  # half of them below the geometric mean of the ends, 0.04


def test_what_makes_no_sense_is_refused():
    for options in (
        {"fraction": 0.0},
        {"fraction": (0.1, 0.05)},
        {"fraction": (0.0, 0.1)},
        {"distractors": 1.0},
        {"lengths": (10, 5)},
        {"lengths": (0, 5)},
    ):
        with pytest.raises(ConfigError, match="planted_signal"):
            planted_signal(2, part="train", **options)


TRAINING = Training(optimizer="adamw", lr=2e-3, epochs=30, bags_per_step=10, select="last", schedule="cosine")


def auc(name, make, task, options, **data):
    train, test = (make(120, part=part, **data).examples for part in ("train", "test"))
    options = {"embed_dims": [32], "dropout": 0.0} | options
    update = {"aggregator": Component(name=name, options=options), "training": TRAINING}
    fitted = fit(RECIPES[name].model_copy(update=update), task, train)
    outputs = predict_outputs(fitted.model, task, test.bags, test.ids)
    return task.metrics(outputs, test.targets.numpy())["auc"]


def test_the_highest_logit_of_an_instance_keeps_the_assumption_that_pooled_features_break():
    """By construction no instance can speak for the negative class; the poison can only be ignored."""
    binary = Binary(classes=("0", "1"))
    assert auc("max", single_concept, binary, {"level": "instance"}) > 0.9
    assert auc("max", single_concept, binary, {}) < 0.5


@pytest.mark.long
def test_attention_finds_what_the_mean_drowns():
    task = Classification(classes=("0", "1"))
    data = {"dim": 16, "lengths": (300, 300), "fraction": 0.02, "shift": 1.2}
    mean = auc("mean", planted_signal, task, {}, **data)
    for name in ("abmil", "dsmil"):
        found = auc(name, planted_signal, task, {}, **data)
        assert found > 0.9
        assert found > mean + 0.05


SPARSE = {"dim": 16, "lengths": (2000, 2000), "fraction": 0.01, "shift": 1.5, "distractors": 0.05}
NARROW = {"embed_dims": [64], "width": 64, "hidden": 32}
LONGER = TRAINING.model_copy(update={"epochs": 40, "bags_per_step": 5, "clip_norm": 1.0, "warmup": 2.0})


def recipe_auc(name):
    """AUC of a recipe's parts, with narrow layers and the same training for all, as in benchmarks/mil_assumption.py."""
    recipe = RECIPES[name]
    host, options = recipe.aggregator.name, recipe.aggregator.options
    has = AGGREGATORS.defaults(host) | options
    narrow = {key: value for key, value in NARROW.items() if has.get(key) and (host, key) != ("dsmil", "hidden")}
    options = options | narrow
    update = {"aggregator": Component(name=host, options=options), "training": LONGER}
    train, test = (planted_signal(80, part=part, **SPARSE).examples for part in ("train", "test"))
    task = Classification(classes=("0", "1"))
    fitted = fit(recipe.model_copy(update=update), task, train)
    outputs = predict_outputs(fitted.model, task, test.bags, test.ids)
    return task.metrics(outputs, test.targets.numpy())["auc"]


@pytest.fixture(scope="module")
def mean_auc():
    return recipe_auc("mean")


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["max", "lse", "abmil", "clam_sb", "clam_mb", "dsmil", "acmil", "acmil_mha", "aem", "mhim"]
)
def test_recipes_find_one_percent_among_distractors_where_the_mean_does_not(name, mean_auc):
    assert recipe_auc(name) > max(0.85, mean_auc + 0.2)
