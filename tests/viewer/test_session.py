import dataclasses

import numpy as np
import pytest
import torch

from eosin.errors import ConfigError
from eosin.mil._checkpoint import ModelCard, build_model
from eosin.mil._jury import Asked
from eosin.mil._recipe import Component, Recipe
from eosin.mil.bags import PackedBags
from eosin.mil.task import make_task
from eosin.viewer._catalogue import Catalogue
from eosin.viewer._session import (
    Edited,
    controls,
    controls_in_words,
    in_words,
    judge,
    state_in_words,
)

TILE = 5 * 16 + 9


def run_model(catalogue, *features):
    with torch.no_grad():
        rows = torch.from_numpy(np.concatenate(features))
        return catalogue.ask("").model(PackedBags.pack([rows])).logits[0].double().numpy()


def test_edits_give_what_the_model_says_of_those_tiles(catalogue, studies):
    study, donor = studies
    x, y = np.array(study.bag.features), np.array(donor.bag.features)
    whole = Edited.untouched(study)
    without = whole.act("remove", np.array([TILE, 3]))
    alone = whole.act("keep only", np.array([TILE, 3, 4]))
    back = without.act("restore", np.array([3]))
    grafted = without.transplant(donor, np.array([5, 2])).transplant(donor, np.array([2, 9]))
    keep = np.ones(len(x), dtype=bool)
    keep[[TILE, 3]] = False
    expected = [
        (whole, run_model(catalogue, x)),
        (without, run_model(catalogue, x[keep])),
        (alone, run_model(catalogue, x[[3, 4, TILE]])),
        (back, run_model(catalogue, np.delete(x, TILE, axis=0))),
        (grafted, run_model(catalogue, x[keep], y[[2, 5, 9]])),
    ]
    for edited, logits in expected:
        np.testing.assert_allclose(edited.logits(), logits, rtol=1e-5, atol=1e-5)
    assert (without.n_removed, grafted.n_removed, grafted.n_added, whole.is_touched) == (2, 2, 3, False)


def test_an_edit_that_leaves_no_tile_is_refused(studies):
    whole = Edited.untouched(studies[0])
    with pytest.raises(ConfigError, match="keep at least one"):
        whole.act("remove", np.arange(192))
    with pytest.raises(ConfigError, match="keep at least one"):
        whole.act("remove", np.arange(100)).act("keep only", np.arange(100))


def test_tiles_are_added_of_several_other_slides_but_not_of_the_slide_itself(catalogue, studies):
    study, donor = studies
    with pytest.raises(ConfigError, match="from this slide"):
        Edited.untouched(study).transplant(study, np.array([1]))
    grafted = Edited.untouched(study).transplant(donor, np.array([1]))
    third = dataclasses.replace(donor, listed=dataclasses.replace(donor.listed, key="other", slide_id="slide-3"))
    both = grafted.transplant(third, np.array([4, 7])).transplant(donor, np.array([0]))
    x, y = np.array(study.bag.features), np.array(donor.bag.features)
    np.testing.assert_allclose(both.logits(), run_model(catalogue, x, y[[0, 1, 4, 7]]), rtol=1e-5, atol=1e-5)
    drawn = both.random_like(np.random.default_rng(0))
    assert [len(one.tiles) for one in both.added] == [len(one.tiles) for one in drawn.added] == [2, 2]
    before = judge(study.asked, Edited.untouched(study).logits())
    assert in_words(catalogue, both, before, judge(study.asked, both.logits()), "tumour").startswith(
        "With 2 tiles of slide-2 and 2 tiles of slide-3 added the model"
    )


def test_words_say_what_was_done_and_what_changed(catalogue, studies):
    study, donor = studies
    whole = Edited.untouched(study)
    before = judge(whole.study.asked, whole.logits())
    assert state_in_words(before).startswith("The model says tumour, probability 0.8")
    without = whole.act("remove", np.array([TILE]))
    after = judge(without.study.asked, without.logits())
    words = in_words(catalogue, without, before, after, "tumour")
    assert words.startswith("Without 1 tile (0.52 %) the model no longer says tumour: 0.8")
    assert f"({after.log_odds['tumour'] - before.log_odds['tumour']:+.2f}" not in words.split("log-odds")[0]
    assert "now says normal" in in_words(catalogue, without, before, after, "normal")
    grafted = without.transplant(donor, np.array([1, 2]))
    assert in_words(catalogue, grafted, before, after, "tumour").startswith(
        "Without 1 tile (0.52 %) and with 2 tiles of slide-2 added the model"
    )
    assert in_words(catalogue, whole.act("keep only", np.array([TILE])), before, before, "tumour").startswith(
        "With only 1 tile (0.52 %) the model still says tumour"
    )


def test_random_edits_are_of_the_same_size_and_the_marked_tile_stands_out(catalogue, studies):
    study, donor = studies
    edited = Edited.untouched(study).act("remove", np.array([TILE])).transplant(donor, np.array([1, 2]))
    drawn = edited.random_like(np.random.default_rng(0))
    assert (drawn.n_removed, drawn.n_added) == (1, 2)
    values = controls(edited, 1)
    before, after = (
        judge(one.study.asked, one.logits()).log_odds["tumour"] for one in (Edited.untouched(study), edited)
    )
    assert (np.abs(values - before) < 0.5).sum() >= 18
    words = controls_in_words(before, after, values)
    assert words.startswith("With as many random tiles instead: 0.8")
    assert "p = 0.0" in words or "p = 0.1" in words


def test_a_task_without_classes_is_told_by_its_columns(studies):
    rows = [{"label": "1.0"}, {"label": "2.5"}]
    task = make_task("regression", rows)
    recipe = Recipe(aggregator=Component(name="abmil", options={}))
    card = ModelCard(recipe=recipe, task=task.model_dump(mode="json"), features=studies[0].bag.spec)
    asked = Asked(build_model(recipe, task, 6).eval(), card)
    catalogue = Catalogue(lambda _slide: asked, card, [])
    assert catalogue.classes == ()
    before, after = judge(asked, np.array([0.0])), judge(asked, np.array([1.0]))
    edited = Edited.untouched(studies[0]).act("remove", np.array([1]))
    words = in_words(catalogue, edited, before, after, "")
    assert words.startswith("Without 1 tile (0.52 %): ")
    assert "→" in words
    assert before.leading == ""
    assert state_in_words(before).startswith("The model says ")
