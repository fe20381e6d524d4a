"""The 8-bit fast paths against the plain formulas."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eosin.wsi import _stain as stain


def density(rgb, glass):
    return np.stack([np.log10((glass[c] + 1) / (rgb[..., c] + 1.0)).clip(0) for c in range(3)])


@given(seed=st.integers(0, 2**31), level=st.sampled_from([(243, 243, 243), (220, 205, 183), (170, 167, 171)]))
@settings(max_examples=20, deadline=None)
def test_light_is_density_within_the_steps_of_8_bits(seed, level):
    rgb = np.random.default_rng(seed).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    glass = np.array(level, float)
    planes = stain.to_light(rgb, glass)
    exact = density(rgb, glass)
    found = stain.DENSITY_OF_LIGHT[planes]
    step = np.log10((planes + 1.5) / np.maximum(planes + 0.5, 0.5))  # half a step to either side
    assert (np.abs(found - exact) <= step + 1e-6).all()


@given(seed=st.integers(0, 2**31), threshold=st.floats(0.01, 0.9))
@settings(max_examples=30, deadline=None)
def test_stained_is_a_difference_of_densities(seed, threshold):
    planes = np.random.default_rng(seed).integers(0, 256, (3, 20, 30), dtype=np.uint8)
    exact = -np.log10((planes + 1.0) / 256)
    found = stain.is_stained(stain.darkest_of(planes), stain.lightest_of(planes), threshold)
    difference = exact.max(axis=0) - exact.min(axis=0)
    sure = np.abs(difference - threshold) > 1e-9
    assert np.array_equal(found[sure], (difference > threshold)[sure])


@given(seed=st.integers(0, 2**31), colour=st.floats(0.05, 0.9))
@settings(max_examples=30, deadline=None)
def test_grey_is_a_share_of_the_density(seed, colour):
    planes = np.random.default_rng(seed).integers(0, 256, (3, 20, 30), dtype=np.uint8)
    exact = -np.log10((planes + 1.0) / 256)
    found = stain.is_stained(stain.darkest_of(planes), stain.lightest_of(planes), 0.0, colour=colour)
    excess = exact.max(axis=0) * (1 - colour) - exact.min(axis=0)
    sure = np.abs(excess) > 1e-9
    assert np.array_equal(found[sure], (excess > 0)[sure])


def test_a_slope_does_not_bend_and_a_speck_does():
    rows, columns = np.indices((20, 30))
    slope = (3 * rows + 2 * columns).astype(np.uint8)
    assert not stain.bends_of(slope)[1:-1, 1:-1].any()
    slope[10, 15] += 7
    bends = stain.bends_of(slope)
    assert bends[10, 15] == 28
    assert bends[10, 14] == bends[9, 15] == 7
    assert stain.roughness(bends)[12, 17] == bends[10:15, 15:20].sum()


@pytest.mark.parametrize("sigma", [0.0, 1.0, 2.0])
def test_glass_has_no_grain_whatever_its_noise(sigma):
    rng = np.random.default_rng(3)
    plane = rng.normal(240, sigma, (200, 200)).clip(0, 255).round().astype(np.uint8)
    rough = stain.roughness(stain.bends_of(plane))
    limit = stain.grain_limit(rough, np.ones(plane.shape, bool))
    assert stain.is_smooth_glass(plane, plane, rough, limit).mean() > 0.99
    tissue = (plane - rng.uniform(0, 25, plane.shape)).round().astype(np.uint8)
    rough = stain.roughness(stain.bends_of(tissue))
    assert stain.is_smooth_glass(tissue, tissue, rough, limit).mean() < 0.01


def test_a_table_is_looked_up_as_numpy_does_it():
    rng = np.random.default_rng(0)
    table, plane = rng.integers(0, 256, 256, dtype=np.uint8), rng.integers(0, 256, (7, 9, 3), dtype=np.uint8)
    assert np.array_equal(stain.look_up(table, plane[..., 1]), table[plane[..., 1]])
