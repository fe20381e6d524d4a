import numpy as np
import pytest
import torch
from scenes import feature_bag
from torch import nn

import eosin.mil.methods  # noqa: F401  (registers the methods)
from eosin.heatmaps.pooled import PooledBag, Target
from eosin.heatmaps.subsets import ForwardBag, look
from eosin.mil.bags import PackedBags
from eosin.mil.slots import AGGREGATORS
from eosin.mil.standardize import Standardized, Standardizer

DIM = 12
N = 15
CLOSED = {
    "abmil": {"embed_dims": (8,), "hidden": 6},
    "abmil heads": {"embed_dims": (8,), "hidden": 6, "heads": 3},
    "clam_sb": {"width": 8, "hidden": 6},
    "clam_mb": {"width": 8, "hidden": 6},
    "acmil": {"width": 8, "hidden": 6, "branches": 3, "mask_p": 0.0},
}
OTHERS = {"mean": {"embed_dims": (8,)}, "max": {"embed_dims": (8,)}}


def build(name, options, n_outputs=2):
    torch.manual_seed(1)
    return AGGREGATORS.build(name.split()[0], DIM, n_outputs, options=options).double().eval()


@pytest.fixture
def bag():
    return feature_bag(np.random.default_rng(0).normal(size=(N, DIM)).astype(np.float32), None)


def forward(model, bag, index):
    values = torch.from_numpy(np.asarray(bag.features)[np.asarray(index)]).double()
    with torch.no_grad():
        return model(PackedBags.pack([values])).logits[0].numpy()


@pytest.mark.parametrize("name", CLOSED)
@pytest.mark.parametrize("n_outputs", [1, 2, 3])
def test_closed_form_is_the_model(bag, name, n_outputs):
    model = build(name, CLOSED[name], n_outputs)
    seen = look(model, bag)
    assert seen.method == "closed form"
    assert isinstance(seen.subsets, PooledBag)
    np.testing.assert_allclose(seen.attention.sum(), 1)
    everything = np.arange(N)
    np.testing.assert_allclose(seen.subsets.logits(), forward(model, bag, everything), rtol=1e-9, atol=1e-11)
    changes = [forward(model, bag, np.delete(everything, i)) - forward(model, bag, everything) for i in everything]
    np.testing.assert_allclose(seen.subsets.leave_one_out(), changes, rtol=1e-8, atol=1e-11)
    np.testing.assert_allclose(
        seen.subsets.remove([2, 3]), forward(model, bag, np.delete(everything, [2, 3])), atol=1e-11
    )
    np.testing.assert_allclose(seen.subsets.keep_only([2, 3]), forward(model, bag, [2, 3]), atol=1e-11)


@pytest.mark.parametrize("name", OTHERS)
def test_other_models_are_run_again(bag, name):
    model = build(name, OTHERS[name])
    seen = look(model, bag)
    assert seen.method == "re-evaluation"
    assert seen.attention is None
    everything = np.arange(N)
    np.testing.assert_allclose(seen.subsets.logits(), forward(model, bag, everything))
    np.testing.assert_allclose(seen.subsets.remove([0, 7]), forward(model, bag, np.delete(everything, [0, 7])))
    np.testing.assert_allclose(seen.subsets.keep_only([7, 0]), forward(model, bag, [0, 7]))
    each = seen.subsets.remove_each([4, 9])
    np.testing.assert_allclose(each, [forward(model, bag, np.delete(everything, i)) for i in (4, 9)])


def test_standardized_model_is_looked_through(bag):
    inner = build("abmil", CLOSED["abmil"])
    standardizer = Standardizer(DIM).double()
    standardizer.mean.fill_(0.3)
    standardizer.scale.fill_(2.0)
    model = Standardized(standardizer, inner).eval()
    seen = look(model, bag)
    assert seen.method == "closed form"
    np.testing.assert_allclose(seen.subsets.logits(), forward(model, bag, np.arange(N)))


def test_model_whose_form_only_looks_closed_is_run_again(bag):
    model = build("abmil", CLOSED["abmil"])
    model.classifier.register_forward_hook(lambda module, inputs, output: output.tanh())
    assert look(model, bag).method == "re-evaluation"


@pytest.mark.parametrize("direction", ["min", "max", "least"])
def test_search_by_re_evaluation_is_that_of_the_closed_form(bag, direction):
    model = build("abmil", CLOSED["abmil"])
    target = Target(1)
    exact = look(model, bag).subsets
    again = ForwardBag(model, PackedBags.pack([torch.from_numpy(np.asarray(bag.features)).double()]))
    first, second = exact.greedy(target, direction, 9), again.greedy(target, direction, 9)
    assert first.order.tolist() == second.order.tolist()
    np.testing.assert_allclose(first.logits, second.logits, atol=1e-10)
    assert second.evaluations == first.evaluations


def test_shortlist_saves_evaluations_and_finds_the_strong_ones(bag):
    model = build("mean", OTHERS["mean"])
    pack = PackedBags.pack([torch.from_numpy(np.asarray(bag.features)).double()])
    target = Target(1, "logit")
    full, short = ForwardBag(model, pack), ForwardBag(model, pack, shortlist=5)
    assert short.greedy(target, "min", 3).evaluations == 15
    assert short.greedy(target, "min", 3).order.tolist() == full.greedy(target, "min", 3).order.tolist()


def test_proxy_ranks_as_the_exact_effects_of_a_linear_model(bag):
    model = build("mean", {"embed_dims": ()})
    pack = PackedBags.pack([torch.from_numpy(np.asarray(bag.features)).double()])
    answers = ForwardBag(model, pack)
    target = Target(1, "logit")
    exact = target.of(answers.remove_each(np.arange(N))) - float(target.of(answers.logits()))
    np.testing.assert_allclose(answers.proxy(target) * N / (N - 1), exact, atol=1e-12)


@pytest.mark.parametrize("name", ["abmil", "mean"])
def test_single_logit_becomes_two_classes(bag, name):
    model = build(name, CLOSED.get(name, OTHERS.get(name)), n_outputs=1)
    answers = look(model, bag, single_logit_is_second_class=True).subsets
    logit = forward(model, bag, np.arange(N))[0]
    np.testing.assert_allclose(answers.logits(), [0.0, logit])
    assert Target(1).of(answers.remove([1])) == pytest.approx(forward(model, bag, np.delete(np.arange(N), 1))[0])
    search = answers.greedy(Target(0), "max", 3)
    assert Target(0).of(search.logits[-1]) >= Target(0).of(search.logits[0])


def test_dropout_is_off(bag):
    model = build("mean", OTHERS["mean"] | {"dropout": 0.5})
    assert any(isinstance(module, nn.Dropout) for module in model.modules())
    answers = look(model.train(), bag).subsets
    np.testing.assert_array_equal(answers.logits(), answers.logits())


@pytest.mark.parametrize("n_outputs", [1, 2, 3])
@pytest.mark.parametrize("seed", [0, 1])
def test_dsmil_is_exact_with_and_without_its_critical_instances(n_outputs, seed):
    model = build("dsmil", {"hidden": 6}, n_outputs)
    features = np.random.default_rng(seed).normal(size=(N, DIM)).astype(np.float32)
    bag = feature_bag(features, None)
    seen = look(model, bag)
    assert seen.method == "closed form but for critical tiles"
    everything = np.arange(N)
    critical = int(seen.subsets.critical[0])
    for gone in ([critical], [critical, 0, 1], np.setdiff1d([2, 3, 4], seen.subsets.critical)):
        expected = forward(model, bag, np.setdiff1d(everything, gone))
        np.testing.assert_allclose(seen.subsets.remove(gone), expected, rtol=1e-9, atol=1e-11)
    full = forward(model, bag, everything)
    changes = [forward(model, bag, np.delete(everything, i)) - full for i in everything]
    np.testing.assert_allclose(seen.subsets.leave_one_out(), changes, rtol=1e-7, atol=1e-11)


@pytest.mark.parametrize("direction", ["min", "max", "least"])
def test_dsmil_search_is_that_of_re_evaluation(bag, direction):
    model = build("dsmil", {"hidden": 6}, 2)
    pack = PackedBags.pack([torch.from_numpy(np.asarray(bag.features)).double()])
    first = look(model, bag).subsets.greedy(Target(1), direction, 10)
    second = ForwardBag(model, pack).greedy(Target(1), direction, 10)
    assert first.order.tolist() == second.order.tolist()
    np.testing.assert_allclose(first.logits, second.logits, atol=1e-10)


def test_dsmil_with_one_logit_speaks_of_two_classes(bag):
    model = build("dsmil", {"hidden": 6}, 1)
    answers = look(model, bag, single_logit_is_second_class=True).subsets
    critical = int(answers.critical[0])
    expected = forward(model, bag, np.delete(np.arange(N), critical))[0]
    np.testing.assert_allclose(answers.remove([critical]), [0.0, expected])
    assert answers.greedy(Target(1), "min", N - 1).order.shape == (N - 1,)


@pytest.mark.parametrize("name", ["abmil", "dsmil", "mean"])
def test_instances_of_another_slide_are_added(bag, name):
    model = build(name, {"abmil": CLOSED["abmil"], "dsmil": {"hidden": 6}, "mean": OTHERS["mean"]}[name])
    donor = feature_bag(np.random.default_rng(7).normal(size=(9, DIM)).astype(np.float32), None)
    both = feature_bag(np.concatenate([bag.features, np.asarray(donor.features)[[2, 5]]]), None)
    answer = look(model, bag).subsets.add(look(model, donor).subsets.select(np.array([2, 5])))
    np.testing.assert_allclose(answer, forward(model, both, np.arange(N + 2)), rtol=1e-9, atol=1e-11)


def test_selected_dsmil_bag_knows_its_critical_instances(bag):
    model = build("dsmil", {"hidden": 6})
    whole = look(model, bag).subsets
    for index in (np.setdiff1d(np.arange(N), whole.critical), np.union1d(whole.critical, [0, 1])):
        part = whole.select(index)
        expected = look(model, feature_bag(np.asarray(bag.features)[index], None)).subsets
        assert part.critical.tolist() == expected.critical.tolist()
        np.testing.assert_allclose(part.leave_one_out(), expected.leave_one_out(), atol=1e-11)
