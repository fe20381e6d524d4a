import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scenes import random_bag

from eosin.mil._closed_forms import PooledBag
from eosin.mil.subsets import Target

PROBABILITY = Target(1, "probability")


def brute(bag, keep):
    """The model written out: softmax over the kept instances, mean of their terms, per branch."""
    logits = bag.bias.copy()
    for branch in range(bag.scores.shape[1]):
        scores = bag.scores[keep, branch]
        share = np.exp(scores - scores.max())
        logits = logits + (share / share.sum()) @ bag.terms[keep, branch]
    return logits


bags = st.builds(
    random_bag,
    st.integers(2, 9),
    branches=st.integers(1, 3),
    outputs=st.integers(1, 3),
    spread=st.sampled_from([0.1, 1.0, 30.0]),
    seed=st.integers(0, 999),
)


@settings(max_examples=60, deadline=None)
@given(bags)
def test_leave_one_out_is_the_model_without_that_instance(bag):
    n = bag.n_instances
    expected = [brute(bag, np.delete(np.arange(n), i)) - brute(bag, np.arange(n)) for i in range(n)]
    np.testing.assert_allclose(bag.leave_one_out(), expected, rtol=1e-9, atol=1e-12)


@settings(max_examples=60, deadline=None)
@given(bags, bags, st.data())
def test_sets_are_the_model_on_those_instances(bag, other, data):
    n = bag.n_instances
    chosen = data.draw(st.lists(st.integers(0, n - 1), min_size=1, max_size=n - 1, unique=True))
    rest = np.setdiff1d(np.arange(n), chosen)
    np.testing.assert_allclose(bag.keep_only(chosen), brute(bag, chosen), rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(bag.remove(chosen), brute(bag, rest), rtol=1e-9, atol=1e-12)
    both, donor = bag.select(rest), bag.select(chosen)
    np.testing.assert_allclose(both.add(donor), brute(bag, np.arange(n)), rtol=1e-9, atol=1e-12)
    expected = [brute(bag, [*rest, i]) for i in chosen]
    np.testing.assert_allclose(both.add_one(donor), expected, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(bag.only_one(), [brute(bag, [i]) for i in range(n)], rtol=1e-9, atol=1e-12)


@settings(max_examples=30, deadline=None)
@given(bags)
def test_log_weight_gradient_is_the_slope(bag):
    step = 1e-6
    for i in range(bag.n_instances):
        ends = []
        for sign in (-1, 1):
            scores = bag.scores.copy()
            scores[i] += sign * step
            ends.append(PooledBag(scores, bag.terms, bag.bias).logits())
        slope = (ends[1] - ends[0]) / (2 * step)
        np.testing.assert_allclose(bag.log_weight_gradient()[i], slope, rtol=1e-5, atol=1e-8)


def brute_greedy(bag, target, direction, rounds):
    alive, order, outputs = list(range(bag.n_instances)), [], [brute(bag, np.arange(bag.n_instances))]
    for _ in range(rounds):
        current = float(target.of(outputs[-1]))
        values = [float(target.of(brute(bag, [j for j in alive if j != i]))) for i in alive]
        cost = {"min": values, "max": [-v for v in values], "least": [abs(v - current) for v in values]}[direction]
        order.append(alive.pop(int(np.argmin(cost))))
        outputs.append(brute(bag, alive))
    return order, np.array(outputs)


@pytest.mark.parametrize("direction", ["min", "max", "least"])
@pytest.mark.parametrize("target", [Target(1), Target(0, "probability"), Target(1, "logit")])
@pytest.mark.parametrize(("branches", "outputs", "spread"), [(1, 2, 1.0), (3, 3, 1.0), (1, 2, 12.0)])
def test_greedy_takes_the_same_instances_as_brute_force(direction, target, branches, outputs, spread):
    bag = random_bag(14, branches=branches, outputs=outputs, spread=spread, seed=5)
    search = bag.greedy(target, direction, rounds=13)
    order, logits = brute_greedy(bag, target, direction, 13)
    assert search.order.tolist() == order
    np.testing.assert_allclose(search.logits, logits, rtol=1e-9, atol=1e-10)


def test_long_search_stays_exact_when_all_the_weight_leaves():
    bag = random_bag(900, spread=9.0, seed=1)
    search = bag.greedy(Target(1), "min", rounds=899)
    for rounds in (1, 10, 255, 256, 300, 800, 899):
        rest = np.setdiff1d(np.arange(900), search.order[:rounds])
        np.testing.assert_allclose(search.logits[rounds], brute(bag, rest), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("direction", ["min", "max"])
@pytest.mark.parametrize("size", [1, 3, 6, 8])
@pytest.mark.parametrize("seed", range(4))
def test_best_set_is_the_best_of_all_sets(direction, size, seed):
    bag = random_bag(9, spread=2.0, seed=seed)
    target = Target(1)
    found = bag.best_set(target, direction, size)
    assert len(found) == size
    values = [float(target.of(bag.remove(list(chosen)))) for chosen in itertools.combinations(range(9), size)]
    best = min(values) if direction == "min" else max(values)
    assert float(target.of(bag.remove(found))) == pytest.approx(best, abs=1e-12)


def test_best_set_is_never_worse_than_greedy():
    bag = random_bag(400, spread=1.5, seed=3)
    target = Target(0)
    search = bag.greedy(target, "min", rounds=40)
    best = bag.remove(bag.best_set(target, "min", 40))
    assert float(target.of(best)) <= float(target.of(search.logits[-1])) + 1e-12


def test_best_set_refuses_what_it_does_not_cover():
    with pytest.raises(ValueError, match="one branch"):
        random_bag(5, branches=2).best_set(Target(1), "min", 2)
    with pytest.raises(ValueError, match="linear"):
        random_bag(5).best_set(PROBABILITY, "min", 2)
    with pytest.raises(ValueError, match="at least one"):
        random_bag(5).best_set(Target(1), "min", 5)


def test_log_odds_and_probability_of_one_and_several_logits():
    assert Target(0).of([0.7]) == pytest.approx(0.7)
    assert Target(0, "probability").of([0.0]) == pytest.approx(0.5)
    logits = np.array([0.2, 1.0, -0.4])
    softmax = np.exp(logits) / np.exp(logits).sum()
    assert Target(1, "probability").of(logits) == pytest.approx(softmax[1])
    assert Target(1).of(logits) == pytest.approx(np.log(softmax[1] / (1 - softmax[1])))
    assert Target(2, "logit").of(logits) == pytest.approx(-0.4)


def test_small_bags():
    bag = random_bag(1)
    np.testing.assert_allclose(bag.logits() + bag.leave_one_out()[0], bag.bias)
    np.testing.assert_allclose(bag.remove([0]), bag.bias)
    assert bag.greedy(Target(1), "min", rounds=5).order.size == 0
    empty = bag.select(np.zeros(0, dtype=int))
    np.testing.assert_allclose(empty.logits(), bag.bias)
    assert empty.leave_one_out().shape == (0, 2)


@pytest.fixture(scope="module")
def golden(shared):
    with np.load(shared / "golden" / "hippo_gated_c2.npz") as arrays:
        return {
            name: arrays[name].astype(np.float64) if arrays[name].dtype.kind == "f" else arrays[name] for name in arrays
        }


@pytest.fixture(scope="module")
def see(golden):
    """The official model as terms and scores."""

    def linear(values, name):
        return values @ golden[f"w_{name}_weight"].T + golden[f"w_{name}_bias"]

    def look(features):
        hidden = np.maximum(linear(features, "embed"), 0)
        gated = np.tanh(linear(hidden, "att_tanh")) / (1 + np.exp(-linear(hidden, "att_gate")))
        terms = hidden @ golden["w_classifier_weight"].T
        return PooledBag(linear(gated, "att_score"), terms[:, None], golden["w_classifier_bias"])

    return look


@pytest.mark.shared
def test_hippo_sets(golden, see):
    bag, donor = see(golden["bag"]), see(golden["donor"])
    close = {"rtol": 1e-9, "atol": 1e-12}
    np.testing.assert_allclose(bag.scores[:, 0], golden["att_raw"], **close)
    np.testing.assert_allclose(bag.logits(), golden["base_logits"][0], **close)
    np.testing.assert_allclose(bag.logits() + bag.leave_one_out(), golden["loo_logits"], **close)
    np.testing.assert_allclose(PROBABILITY.of(bag.logits() + bag.leave_one_out()), golden["loo_prob"][:, 1], **close)
    np.testing.assert_allclose(bag.add_one(donor), golden["add_one_logits"], **close)
    np.testing.assert_allclose(bag.add(donor), golden["add_all_logits"], **close)
    np.testing.assert_allclose(bag.remove(golden["set_S"]), golden["remove_S_logits"], **close)
    np.testing.assert_allclose(bag.keep_only(golden["set_S"]), golden["only_S_logits"], **close)
    np.testing.assert_allclose(bag.only_one(), golden["only_one_logits"], **close)


@pytest.mark.shared
@pytest.mark.parametrize("percent", [1, 5, 20])
def test_hippo_attention_ablation(golden, see, percent):
    bag = see(golden["bag"])
    order = np.argsort(-bag.scores[:, 0], kind="stable")
    assert order.tolist() == golden["att_order"].tolist()
    k = int(golden[f"remove_topatt_{percent}pct_k"])
    assert k == int(np.ceil(bag.n_instances * percent / 100))
    expected = golden[f"remove_topatt_{percent}pct_prob"][1]
    assert PROBABILITY.of(bag.remove(order[:k])) == pytest.approx(expected, rel=1e-9)


@pytest.mark.shared
@pytest.mark.parametrize(
    ("name", "direction", "rounds"), [("min", "min", 8), ("max", "max", 8), ("small", "least", 8), ("full", "min", 29)]
)
def test_hippo_greedy(golden, see, name, direction, rounds):
    search = see(golden["bag"]).greedy(PROBABILITY, direction, rounds=rounds)
    assert search.order.tolist() == golden[f"greedy_{name}_idx"].tolist()
    expected = golden[f"greedy_{name}_out"]
    np.testing.assert_allclose(PROBABILITY.of(search.logits), expected[:, 1], rtol=1e-9)
    np.testing.assert_allclose(Target(0, "probability").of(search.logits), expected[:, 0], rtol=1e-9)
    assert 2 + rounds + search.evaluations == int(golden[f"greedy_{name}_calls"])


@pytest.mark.shared
def test_hippo_defect_with_constant_features_is_not_reproduced(golden, see):
    joined = see(golden["bag"]).join(see(golden["donor"]))
    first = PROBABILITY.of(joined.logits())
    assert first == pytest.approx(golden["greedy_const_out"][0, 1], rel=1e-9)
    search = joined.greedy(PROBABILITY, "min", rounds=4)
    assert not np.allclose(PROBABILITY.of(search.logits)[1:], golden["greedy_const_out"][1:, 1], rtol=1e-6)
