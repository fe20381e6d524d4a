import numpy as np
import pytest

from eosin.heatmaps.rollout import flow, rollout, rollout_row, with_residual


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
    tolerance = 1e-6  # capacities are whole numbers of 2^-24
    np.testing.assert_allclose(flow(golden["att_mean"]), golden["flow_last_layer"], atol=tolerance)
    np.testing.assert_allclose(flow(golden["att_mean"][:1]), golden["flow_layer1"], atol=tolerance)


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
    with pytest.raises(ValueError, match="more than 400"):
        flow(np.zeros((1, 401, 401)))
