"""The linear part of models for small cohorts: the one solution, exact what-ifs, folders that are read back."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from eosin.features._bag import FeatureSpec
from eosin.mil import _linear
from eosin.mil import bags as mil_bags
from eosin.mil._checkpoint import load_model
from eosin.mil._data import Examples, MemoryBags
from eosin.mil._linear import RIDGE, LinearPart, WithLinear, ridge, share_of
from eosin.mil._recipe import Component, Recipe, Training, choose_recipe
from eosin.mil._train import fit
from eosin.mil.bags import PackedBags
from eosin.mil.tasks._classification import Classification
from eosin.mil.tasks._regression import Regression

TASK = Classification(classes=("a", "b"))
SMALL = Component(name="abmil", options={"embed_dims": [8], "hidden": 4})
RECIPE = Recipe(aggregator=SMALL, training=Training(epochs=2, select="last"), linear_below=60)


def examples(n=24, dim=5, seed=0):
    """Classes differ in how much the second feature varies, not in its mean."""
    generator = torch.Generator().manual_seed(seed)
    targets = torch.arange(n) % 2
    bags = {}
    for number, target in enumerate(targets.tolist()):
        bag = torch.randn(20 + number, dim, generator=generator)
        bag[:, 1] *= 1.0 + target
        bags[f"s{number:02}"] = 100 + 10 * bag
    source = MemoryBags(bags, FeatureSpec(encoder="toy", dim=dim))
    return Examples(source, tuple(bags), tuple(bags), targets)


def test_weights_are_those_of_scikit_learn():
    columns = torch.randn(40, 60, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    targets = (columns[:, 0] + columns[:, 1] > 0).long()
    weight, bias = ridge(TASK, columns, targets)
    # the difference of two logits has half the penalty of each
    other = LogisticRegression(C=2 / RIDGE, tol=1e-10, max_iter=10_000).fit(columns.numpy(), targets.numpy())
    np.testing.assert_allclose((weight[1] - weight[0]).numpy(), other.coef_[0], atol=1e-5)
    np.testing.assert_allclose(float(bias[1] - bias[0]), other.intercept_[0], atol=1e-5)


def test_ridge_of_a_number_is_the_closed_form():
    generator = torch.Generator().manual_seed(2)
    columns = torch.randn(30, 3, generator=generator, dtype=torch.float64)
    columns -= columns.mean(0)
    targets = columns @ torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64) + 3
    task = Regression(target="y").fit_to(targets)
    weight, bias = ridge(task, columns, targets)
    logits = (columns @ weight.T + bias).requires_grad_()
    task.bag_losses(logits, targets).sum().backward()
    gradient = logits.grad.T @ columns + RIDGE * weight
    torch.testing.assert_close(gradient, torch.zeros_like(gradient), atol=1e-4, rtol=0)


def test_spread_is_seen_where_means_are_equal():
    train, test = examples(seed=0), examples(seed=3)
    part = LinearPart.solve(TASK, train)
    logits = torch.cat([part(PackedBags.pack([test.bags.load(name)])) for name in test.ids])
    assert (logits.argmax(1) == test.targets).float().mean() > 0.9


def test_only_small_sets_get_one():
    assert choose_recipe().linear_below == 200
    assert choose_recipe("abmil").linear_below == 0
    fitted = fit(RECIPE, TASK, examples())
    assert isinstance(fitted.model, WithLinear)
    assert fitted.card.training["linear_share"] == 0.6
    large = fit(RECIPE.model_copy(update={"linear_below": 24}), TASK, examples())
    assert not isinstance(large.model, WithLinear)


def test_there_is_none_where_means_say_nothing():
    plain = examples()
    shuffled = Examples(plain.bags, plain.ids, plain.ids, torch.arange(24) // 2 % 2)
    assert LinearPart.solve(TASK, plain) is not None
    assert LinearPart.solve(TASK, shuffled) is None
    assert fit(RECIPE, TASK, shuffled).card.training["linear_share"] == 0


def test_few_slides_leave_the_network_less_to_say():
    assert [share_of(slides, 200) for slides in (20, 50, 100, 199)] == [0.9, 0.75, 0.5, 0.5]


def test_validation_slides_count_and_the_refit_has_one_too():
    whole = examples()
    recipe = RECIPE.model_copy(update={"training": Training(epochs=2, refit=True), "linear_below": 25})
    fitted = fit(recipe, TASK, whole.subset(whole.ids[:18]), whole.subset(whole.ids[18:]))
    assert isinstance(fitted.model, WithLinear)
    refitted = LinearPart.solve(TASK, whole.subset(whole.ids[:18]).joined(whole.subset(whole.ids[18:])))
    torch.testing.assert_close(fitted.model.linear.readout.weight, refitted.readout.weight)


@pytest.mark.parametrize("standardize", [True, False])
def test_a_saved_model_answers_as_before(tmp_path, standardize):
    recipe = RECIPE.model_copy(update={"training": Training(epochs=1, select="last", standardize=standardize)})
    fitted = fit(recipe, TASK, examples(), folder=tmp_path)
    again, _ = load_model(tmp_path)
    bag = PackedBags.pack([examples().bags.load("s03")])
    assert torch.equal(again(bag).logits, fitted.model(bag).logits)


@pytest.fixture(scope="module")
def model():
    return fit(RECIPE, TASK, examples()).model


def test_every_what_if_is_the_model_itself(model):
    bag = examples().bags.load("s05")
    form = model.readout(PackedBags.pack([bag]), model(PackedBags.pack([bag])))

    def run(rows):
        return model(PackedBags.pack([rows])).logits[0].detach().numpy()

    np.testing.assert_allclose(form.logits(), run(bag), atol=1e-4)
    alone, without = form.only_one(), form.leave_one_out()
    for row in (0, 7):
        np.testing.assert_allclose(alone[row], run(bag[row : row + 1]), atol=1e-4)
        rest = torch.cat([bag[:row], bag[row + 1 :]])
        np.testing.assert_allclose(form.logits() + without[row], run(rest), atol=1e-4)


def test_slope_of_weights_is_that_of_the_closed_form(model):
    bags = PackedBags.pack([examples().bags.load("s05")])
    form = model.readout(bags, model(bags))
    found = model.weight_gradient(bags, lambda logits: logits[1] - logits[0])
    np.testing.assert_allclose(found, form.log_weight_gradient() @ [-1, 1], atol=1e-6)


def test_a_bag_without_instances_has_an_answer(model):
    assert model(PackedBags.pack([torch.zeros(0, 5)])).logits.isfinite().all()


def test_a_large_bag_is_answered_in_pieces_as_whole(model, monkeypatch):
    bag = PackedBags.pack([examples().bags.load("s05")])
    with torch.no_grad():
        whole = model(bag)
        terms = model.linear.terms(bag)
        monkeypatch.setattr(mil_bags, "LARGE_BAG", 4)
        monkeypatch.setattr(mil_bags, "PIECE_ROWS", 4)
        monkeypatch.setattr(_linear, "PIECE_ROWS", 4)
        monkeypatch.setattr(LinearPart, "means", only_pieces_of(4, LinearPart.means))
        pieces = model(bag)
        np.testing.assert_allclose(model.linear.terms(bag), terms, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(pieces.logits, whole.logits, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(pieces.scores, whole.scores, rtol=1e-5, atol=1e-6)


def only_pieces_of(most, means):
    def checked(self, bags):
        assert bags.n_instances <= most
        return means(self, bags)

    return checked
