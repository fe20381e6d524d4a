from dataclasses import replace

import numpy as np
import pytest
import torch
from scenes import feature_bag
from scipy.stats import spearmanr
from torch import nn

import eosin.mil.methods  # noqa: F401  (registers the methods)
from eosin.heatmaps._subject import look
from eosin.mil._reevaluation import ForwardBag, plan_search
from eosin.mil._standardize import Standardized, Standardizer
from eosin.mil.bags import PackedBags
from eosin.mil.slots import AGGREGATORS, AttentionOutput
from eosin.mil.subsets import Target

DIM = 12
N = 15
CLOSED = {
    "abmil": {"embed_dims": (8,), "hidden": 6},
    "abmil heads": {"embed_dims": (8,), "hidden": 6, "heads": 3},
    "clam_sb": {"width": 8, "hidden": 6},
    "clam_mb": {"width": 8, "hidden": 6},
    "acmil": {"width": 8, "hidden": 6, "branches": 3, "mask_p": 0.0},
    "mean": {"embed_dims": (8,)},
    "max": {"embed_dims": (8,)},
    "lse": {"embed_dims": (8,)},
    "mean instance": {"embed_dims": (8,), "level": "instance"},
    "max instance": {"embed_dims": (8,), "level": "instance"},
    "lse instance": {"embed_dims": (8,), "level": "instance"},
    "ins": {"width": 8, "projection": 4, "pooling": "max"},
    "ins or": {"width": 8, "projection": 4, "pooling": "noisy_or"},
    "ins mean": {"width": 8, "projection": 4, "pooling": "mean"},
    "acmil_mha": {"width": 8, "heads": 2, "branches": 3, "mask_p": 0.0},
}
OTHERS = {
    "set_transformer": {"embed_dims": (8,), "width": 8, "heads": 2, "tokens": 3, "sab_layers": 1, "seeds": 2},
    "transmil": {"width": 8, "heads": 2, "landmarks": 4},
    "mambamil": {"width": 8, "d_state": 4, "hidden": 6},
    "gdat": {"width": 8, "heads": 2, "region_size": 2, "hidden": 6},
    "downsampled": {"host": "abmil", "host_options": {"embed_dims": (8,), "hidden": 6}, "hidden": 6},
}


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
    assert seen.subsets.instant
    assert seen.subsets.exact
    if issubclass(model.output_type, AttentionOutput):
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


@pytest.mark.parametrize("name", ["max", "lse", "ins", "ins mean", "ins or", "acmil_mha"])
@pytest.mark.parametrize("direction", ["min", "max", "least"])
def test_search_of_every_exact_bag_is_that_of_re_evaluation(bag, name, direction):
    model = build(name, CLOSED[name])
    exact = look(model, bag).subsets
    again = ForwardBag(model, PackedBags.pack([torch.from_numpy(np.asarray(bag.features)).double()]))
    first, second = exact.greedy(Target(1), direction, 9), again.greedy(Target(1), direction, 9)
    np.testing.assert_allclose(first.logits, second.logits, atol=1e-9)
    if direction == "min":
        assert first.order.tolist() == second.order.tolist()


@pytest.mark.parametrize(
    "name", ["max", "lse", "ins", "ins mean", "ins or", "acmil_mha", "mean", "mean instance", "lse instance"]
)
@pytest.mark.parametrize("n", [1, 2])
def test_smallest_bags_of_every_exact_form(name, n):
    model = build(name, CLOSED[name])
    small = feature_bag(np.random.default_rng(3).normal(size=(n, DIM)).astype(np.float32), None)
    seen = look(model, small)
    assert seen.method == "closed form"
    expected = [forward(model, small, np.delete(np.arange(n), i)) for i in range(n)]
    np.testing.assert_allclose(seen.subsets.logits() + seen.subsets.leave_one_out(), expected, atol=1e-11)
    assert seen.subsets.greedy(Target(1), "min", 5).order.shape == (n - 1,)


@pytest.mark.parametrize("name", ["lse", "acmil_mha"])
def test_one_instance_with_nearly_all_the_weight_costs_no_digits(name):
    model = build(name, CLOSED[name] | ({"sharpness": 40.0} if name == "lse" else {}))
    features = np.random.default_rng(0).normal(size=(N, DIM)).astype(np.float32)
    features[4] *= 30
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)
    bag = feature_bag(features, None)
    everything = np.arange(N)
    changes = [forward(model, bag, np.delete(everything, i)) - forward(model, bag, everything) for i in everything]
    np.testing.assert_allclose(look(model, bag).subsets.leave_one_out(), changes, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("name", ["lse", "ins mean", "acmil_mha", "mean", "abmil heads"])
def test_weight_gradient_is_the_slope_of_copies(bag, name):
    """An instance of weight w is w copies of it: the slope at 1 by bags with all instances 20 times, one 19 or 21."""
    model = build(name, CLOSED[name])
    gradient = look(model, bag).subsets.log_weight_gradient()
    for i in (0, 7):
        ends = []
        for count in (199, 201):
            copies = np.full(N, 200)
            copies[i] = count
            ends.append(forward(model, bag, np.repeat(np.arange(N), copies)))
        np.testing.assert_allclose(gradient[i], (ends[1] - ends[0]) * 100, rtol=2e-4, atol=1e-7)


def test_weight_gradient_of_a_noisy_or_is_the_slope_of_the_sum(bag):
    seen = look(build("ins or", CLOSED["ins or"]), bag).subsets
    ends = []
    for factor in (1 - 1e-6, 1 + 1e-6):
        none = seen.none.clone()
        none[3] *= factor
        ends.append(replace(seen, none=none).logits())
    np.testing.assert_allclose(seen.log_weight_gradient()[3], (ends[1] - ends[0]) / 2e-6, rtol=1e-6)


def test_a_maximum_has_no_weights(bag):
    assert look(build("max", CLOSED["max"]), bag).subsets.log_weight_gradient() is None


def again_of(name, bag, **options):
    model = build(name, OTHERS[name])
    return ForwardBag(model, PackedBags.pack([torch.from_numpy(np.asarray(bag.features)).double()]), **options)


def test_search_in_blocks_stays_within_its_budget():
    bag = feature_bag(np.random.default_rng(0).normal(size=(400, DIM)).astype(np.float32), None)
    answers = again_of("gdat", bag, shortlist=20, budget=400 * 150)
    search = answers.greedy(Target(1), "min", 40)
    assert search.steps.tolist() == list(range(0, 41, 4))  # 1 % of the tiles per step
    assert search.evaluations <= 150
    assert len(set(search.order.tolist())) == 40
    rest = np.setdiff1d(np.arange(400), search.order[:8])
    np.testing.assert_allclose(search.logits[2], answers.keep_only(rest))
    assert Target(1).of(search.logits[-1]) < Target(1).of(search.logits[0])


@pytest.mark.parametrize(
    ("n", "rounds", "block", "shortlist"),
    [(300, 10, 1, 256), (1000, 10, 1, 256), (10_000, 10, 10, 256), (10_000, 100, 100, 256), (200_000, 100, 100, 100)],
)
def test_plan_divides_the_budget(n, rounds, block, shortlist):
    plan = plan_search(n, rounds)
    assert plan == (block, shortlist)
    assert plan.shortlist * -(-rounds // plan.block) * n <= max(4_000_000, 100 * n)


@pytest.mark.parametrize("name", OTHERS)
def test_guess_of_models_that_are_run_again_is_measured(bag, name):
    answers = again_of(name, bag)
    target = Target(1)
    guess = answers.best_guess(target)
    exact = target.of(answers.remove_each(np.arange(N))) - target.of(answers.logits())
    others = [spearmanr(values, exact).statistic for values in answers.guesses(target).values()]
    assert guess.sample == N
    assert guess.agreement == pytest.approx(max(others))
    assert guess.agreement > 0.1


def test_shortlist_saves_evaluations_and_finds_the_strong_ones(bag):
    model = build("mean", CLOSED["mean"])
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
    np.testing.assert_allclose(answers.gradient_guess(target) * N / (N - 1), exact, atol=1e-12)


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
    model = build("mean", CLOSED["mean"] | {"dropout": 0.5})
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
    model = build(name, {"abmil": CLOSED["abmil"], "dsmil": {"hidden": 6}, "mean": CLOSED["mean"]}[name])
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
