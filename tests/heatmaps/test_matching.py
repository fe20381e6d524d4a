"""Random sets that share with a set what they are matched by."""

import numpy as np
import pytest
import torch
from scenes import feature_bag, lattice

from eosin.errors import ConfigError
from eosin.heatmaps._examination import Questions, examine
from eosin.mil._checkpoint import ModelCard
from eosin.mil._recipe import Recipe
from eosin.mil.methods.abmil import Abmil
from eosin.mil.tasks._classification import Classification

GRID = lattice(size_px0=(400, 400), slide_mpp=0.5, patch_size=40)
TISSUE = np.tile([0.3, 0.6, 0.8, 0.95, 1.0], 20)
SIDE = np.minimum(4 * GRID.origins_px0 // 361, 3)  # of 16 parts of where tiles begin, 0 to 360
PARTS = SIDE[:, 0] * 4 + SIDE[:, 1]


def asked(feature, matched, tissue=None):
    """Ask about a region of 30 tiles when tiles differ in one feature alone."""
    torch.manual_seed(0)
    model = Abmil(2, 2, embed_dims=(4,), hidden=3, dropout=0.0).double().eval()
    bag = feature_bag(np.stack([5 * feature, np.ones(len(feature))], 1).astype(np.float32), GRID)
    card = ModelCard(recipe=Recipe(), task=Classification(classes=("a", "b")).model_dump(), features=bag.spec)
    questions = Questions(fractions=(0.1,), rounds=2, controls=20, matched=matched)
    region = {"region": np.random.default_rng(1).choice(100, 30, replace=False)}
    found = examine(model, card, bag, class_name="b", regions=region, questions=questions, tissue=tissue)
    return next(effect for effect in found.effects if effect.what == "region" and effect.kind == "remove")


@pytest.mark.parametrize(("matched", "feature"), [("tissue", TISSUE), ("position", PARTS.astype(float))])
def test_matched_sets_hold_as_many_tiles_of_each_kind(matched, feature):
    effect = asked(feature, matched, TISSUE)
    # tiles of a kind are alike, so a set with as many of each is the same bag to the model
    assert effect.control_sd == pytest.approx(0, abs=1e-9)
    assert effect.control_mean == pytest.approx(effect.after)
    assert asked(feature, "number").control_sd > 1e-4


def test_sets_are_matched_by_fifths_of_the_attention():
    feature = np.repeat(np.arange(5.0), 20)  # 20 tiles of each of five weights
    assert asked(feature, "attention").control_sd == pytest.approx(0, abs=1e-9)
    assert asked(feature, "number").control_sd > 1e-4


def test_tissue_that_is_not_known_is_asked_for():
    with pytest.raises(ConfigError, match="share of tissue is found on the slide"):
        asked(TISSUE, "tissue")
