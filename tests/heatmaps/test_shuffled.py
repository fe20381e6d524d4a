import numpy as np
import pytest
import torch
from scenes import feature_bag

from eosin.heatmaps._cohort import mean_change, summarise_cohort
from eosin.heatmaps._examination import Questions, examine
from eosin.mil._checkpoint import ModelCard
from eosin.mil._recipe import Recipe
from eosin.mil._shuffled import shuffle_weights
from eosin.mil.methods.abmil import Abmil
from eosin.mil.tasks._classification import Classification

ASKED = Questions(fractions=(0.2,), rounds=3, controls=0)
SLIDES, TILES, WIDTH = 6, 12, 4


def test_the_same_weights_in_another_order():
    model = Abmil(6, 2)
    shuffled = shuffle_weights(model, 1)
    changed = 0
    for (name, ours), theirs in zip(model.named_parameters(), shuffled.parameters(), strict=True):
        assert torch.equal(ours.flatten().sort().values, theirs.flatten().sort().values), name
        changed += not torch.equal(ours, theirs)
    assert changed >= 6
    again = shuffle_weights(model, 1)
    assert all(torch.equal(a, b) for a, b in zip(shuffled.parameters(), again.parameters(), strict=True))


def asked(model, card, bags):
    found = [examine(model, card, bag, class_name="b", questions=ASKED) for bag in bags]
    return [{(effect.kind, effect.what): effect for effect in one.effects} for one in found]


def rejections(seed, shuffles):
    """Ask a model with random weights, and return its searched and attended sets' p values beside shuffled weights."""
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    bags = [feature_bag(rng.normal(size=(TILES, WIDTH)).astype(np.float32), None) for _ in range(SLIDES)]
    model = Abmil(WIDTH, 2, embed_dims=(8,), hidden=4, dropout=0.0).eval()
    card = ModelCard(recipe=Recipe(), task=Classification(classes=("a", "b")).model_dump(), features=bags[0].spec)
    own, others = asked(model, card, bags), [asked(shuffle_weights(model, k), card, bags) for k in range(shuffles)]
    patients = [str(number) for number in range(SLIDES)]
    found = []
    for key in own[0]:
        if all(key in slide for slide in own):
            there = [[number for number, slide in enumerate(other) if key in slide] for other in others]
            changes = [
                mean_change([other[number][key] for number in rows], [patients[number] for number in rows])
                for other, rows in zip(others, there, strict=True)
            ]
            found.append(summarise_cohort([s[key] for s in own], None, patients, shuffled=changes).p_shuffled)
    return found


@pytest.mark.slow
def test_random_models_are_rejected_as_rarely_as_promised():
    p_values = [p for seed in range(60) for p in rejections(seed, 19)[:3]]
    assert np.mean(np.array(p_values) <= 0.05) <= 0.06 + 2 * np.sqrt(0.05 * 0.95 / 60)
