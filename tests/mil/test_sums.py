import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scenes import random_bag

from eosin.mil._closed_forms import pooled_logits


@given(st.integers(0, 10**6), st.sampled_from([1.0, 30.0, 400.0]), st.integers(1, 4), st.integers(1, 3))
def test_sums_answer_as_the_softmax_of_the_chosen_ones(seed, spread, branches, outputs):
    one, other = (random_bag(20, branches=branches, outputs=outputs, spread=spread, seed=seed + k) for k in (0, 1))
    other = type(other)(other.scores + spread, other.terms, one.bias)
    rng = np.random.default_rng(seed)
    kept, added = rng.random(20) < 0.5, rng.random(20) < 0.3
    kept[0] = True
    np.testing.assert_allclose(pooled_logits([(one, kept)]), one.keep_only(np.flatnonzero(kept)), rtol=1e-9, atol=1e-9)
    joined = one.select(np.flatnonzero(kept)).join(other.select(np.flatnonzero(added)))
    np.testing.assert_allclose(pooled_logits([(one, kept), (other, added)]), joined.logits(), rtol=1e-9, atol=1e-9)


def test_a_rest_that_weighs_nothing_beside_what_was_taken_is_still_exact():
    bag = random_bag(5, spread=1.0)
    bag = type(bag)(bag.scores + np.array([[2000.0], [0], [0], [0], [0]]), bag.terms, bag.bias)
    rest = np.array([False, True, True, True, True])
    assert pooled_logits([(bag, rest)]) == pytest.approx(bag.keep_only([1, 2, 3, 4]), rel=1e-12)
