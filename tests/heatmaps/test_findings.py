"""What is said of a set of tiles depends on where it comes from and never on what it is called."""

import numpy as np
import pytest
import torch
from scenes import feature_bag

from eosin.heatmaps._counterfactual import Origin
from eosin.heatmaps._examination import Questions, examine
from eosin.mil._checkpoint import ModelCard, build_model
from eosin.mil._recipe import Component, Recipe, Training
from eosin.mil.task import make_task

DIM, N = 6, 40
NAMES = (
    "tiles in tumour nests",
    "tiles in most attended nests",
    "1 % most attended tiles",
    "tiles of the search",
    "smallest necessary set",
    "smallest sufficient set of mine",
    "best set of the search's size",
)


@pytest.fixture(scope="module")
def slide():
    task = make_task("classification", [{"label": "normal"}, {"label": "tumour"}])
    options = {"embed_dims": (4,), "hidden": 3}
    recipe = Recipe(aggregator=Component(name="abmil", options=options), training=Training(standardize=False))
    torch.manual_seed(0)
    model = build_model(recipe, task, DIM).eval()
    bag = feature_bag(np.random.default_rng(0).normal(size=(N, DIM)).astype(np.float32), None)
    return model, ModelCard(recipe=recipe, task=task.model_dump(mode="json"), features=bag.spec), bag


@pytest.mark.parametrize("name", NAMES)
def test_a_region_is_told_whatever_it_is_called(slide, name):
    found = examine(*slide, regions={name: np.arange(5)}, questions=Questions(rounds=5, controls=9))
    mine = [effect for effect in found.effects if effect.origin is Origin.REGION]
    assert [effect.kind for effect in mine] == ["remove", "keep only"]
    table = found.table()
    assert (table.tiles == name).sum() >= 2
    said = found.sentences()
    assert sum(sentence.startswith((f"Without the {name} (", f"With the {name} alone (")) for sentence in said) >= 2


def test_sets_that_were_searched_know_that_they_were(slide):
    found = examine(*slide, questions=Questions(rounds=5, controls=9, fractions=(0.1, 0.2)))
    origins = [effect.origin for effect in found.effects]
    assert origins[:4] == [Origin.RANKING] * 4
    assert origins[4:6] == [Origin.SEARCH, Origin.BEST]
    assert {origin for origin in origins if origin.is_found} >= {Origin.SEARCH, Origin.BEST}
    assert not Origin.RANKING.is_found
    assert not Origin.REGION.is_found
    kept = [sentence for sentence in found.sentences() if sentence.startswith("With the")]
    assert len(kept) == 1  # of the ranking's shares kept alone one is enough to read
