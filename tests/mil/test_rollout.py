import numpy as np
import pytest

from eosin.mil._rollout import flow, rollout, rollout_row, with_residual


def random_attention(layers, tokens, seed=0):
    raw = np.random.default_rng(seed).random((layers, tokens, tokens)) ** 3
    return raw / raw.sum(-1, keepdims=True)


@pytest.fixture(scope="module")
def golden(shared):
    with np.load(shared / "golden" / "attention_rollout.npz") as arrays:
        return dict(arrays)


@pytest.mark.shared
def test_rollout_of_the_authors(golden):
    np.testing.assert_allclose(golden["att"].mean(1), golden["att_mean"], rtol=1e-12)
    layers = rollout(golden["att_mean"])
    np.testing.assert_allclose([with_residual(layer) for layer in golden["att_mean"]], golden["aug"], rtol=1e-9)
    np.testing.assert_allclose(layers, golden["rollout_per_layer"], rtol=1e-9)
    np.testing.assert_allclose(layers[-1], golden["rollout"], rtol=1e-9)
    plain = rollout(golden["att_mean"], residual="none")[-1]
    np.testing.assert_allclose(plain, golden["rollout_noresidual"], rtol=1e-9)


@pytest.mark.shared
def test_flow_of_the_authors(golden):
    np.testing.assert_allclose(flow(golden["att_mean"]), golden["flow_last_layer"], rtol=1e-9)
    np.testing.assert_allclose(flow(golden["att_mean"][:1]), golden["flow_layer1"], rtol=1e-9)


def largest_flow(capacity, source, sink):
    """Augment along shortest paths until there is none (Edmonds and Karp 1972), in floating point."""
    left, total = capacity.copy(), 0.0
    while True:
        before, queue = {source: source}, [source]
        for node in queue:
            new = [int(place) for place in np.flatnonzero(left[node] > 1e-14) if int(place) not in before]
            before |= dict.fromkeys(new, node)
            queue += new
        if sink not in before:
            return total
        path = [sink]
        while path[-1] != source:
            path.append(before[path[-1]])
        ends, starts = path[:-1], path[1:]
        amount = left[starts, ends].min()
        left[starts, ends] -= amount
        left[ends, starts] += amount
        total += amount


@pytest.mark.parametrize(("layers", "tokens"), [(1, 2), (3, 6), (5, 4)])
def test_flow_is_that_of_another_algorithm(layers, tokens):
    attention = random_attention(layers, tokens, seed=layers)
    capacity = np.zeros([(layers + 1) * tokens] * 2)
    for layer, each in enumerate(attention):
        above, below = ((layer + step) * tokens for step in (1, 0))
        capacity[above : above + tokens, below : below + tokens] = with_residual(each)
    wanted = [[largest_flow(capacity, layers * tokens + i, j) for j in range(tokens)] for i in range(tokens)]
    np.testing.assert_allclose(flow(attention), wanted / np.sum(wanted, 1, keepdims=True), rtol=1e-9)


def test_maps_of_several_heads_are_refused():
    heads = random_attention(4, 4)[None]
    for follow in (rollout, flow):
        with pytest.raises(ValueError, match=r"the mean over heads; found \(4, 4, 4\)"):
            follow(heads)


def test_row_is_that_of_the_full_product():
    attention = random_attention(4, 30)
    token = np.eye(30)[3]
    row = rollout_row(token, [lambda r, layer=layer: r @ layer for layer in attention])
    np.testing.assert_allclose(row, rollout(attention)[-1][3], rtol=1e-12)


def test_row_through_factors_never_forms_the_map():
    rng = np.random.default_rng(1)
    down, up = (
        rng.dirichlet(np.ones(50), size=4),
        rng.dirichlet(np.ones(4), size=50),
    )  # inducing points read, then write
    row = rollout_row(np.full(50, 0.02), [lambda r: (r @ up) @ down])
    np.testing.assert_allclose(row, np.full(50, 0.02) @ with_residual(up @ down), rtol=1e-12)
    assert row.sum() == pytest.approx(1)


def test_negative_entries_are_cut():
    row = rollout_row(np.array([1.0, 0.0]), [lambda r: np.array([1.5, -0.5])])
    assert row.min() >= 0
    assert row.sum() == pytest.approx(1)


def test_flow_is_for_few_tokens():
    with pytest.raises(ValueError, match="limited to 400 tokens"):
        flow(np.zeros((1, 401, 401)))
