"""The 8-bit fast paths against the plain formulas."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from eosin.wsi import stain


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


@pytest.mark.parametrize("side", [3, 5, 8])
def test_nothing_that_is_even_is_missed_by_the_quick_look(side):
    rng = np.random.default_rng(side)
    smooth = ndimage.gaussian_filter(rng.normal(0, 1, (200, 200)), 6)
    plane = (90 + 160 * smooth / np.abs(smooth).max() + rng.normal(0, 0.4, smooth.shape)).clip(0, 255).astype(np.uint8)
    values = stain.DENSITY_OF_LIGHT[plane].astype(np.float64)
    mean = ndimage.uniform_filter(values, side)
    variance = ndimage.uniform_filter(values**2, side) - mean**2
    even = (mean > 0.4) & (variance < (stain.FLAT_VARIATION * mean) ** 2)
    whole = np.zeros(plane.shape, bool)
    whole[side:-side, side:-side] = True  # windows that lie in the picture
    assert (even & whole).sum() > 20
    assert not (even & whole & ~stain._perhaps_even(plane, side)).any()


def test_colours_are_only_looked_at_where_they_can_be_ink():
    rng = np.random.default_rng(0)
    planes = rng.integers(0, 256, (3, 200, 300), dtype=np.uint8)
    densities = stain.DENSITY_OF_LIGHT[planes]
    strong = densities.max(axis=0) > stain.PEN_MIN_DENSITY + 1e-6
    odd = stain._has_colour_of_no_stain(densities.reshape(3, -1)).reshape(strong.shape) & strong
    darkest = stain.darkest_of(planes)
    assert odd.sum() > 1000
    assert not (odd & ~stain._is_not_darkest_in_green(planes, darkest)).any()
    red = stain._is_red(densities.reshape(3, -1)).reshape(strong.shape)
    assert red.sum() > 100
    assert not (red & ~stain._may_be_red(planes)).any()


def test_a_table_is_looked_up_as_numpy_does_it():
    rng = np.random.default_rng(0)
    table, plane = rng.integers(0, 256, 256, dtype=np.uint8), rng.integers(0, 256, (7, 9, 3), dtype=np.uint8)
    assert np.array_equal(stain.look_up(table, plane[..., 1]), table[plane[..., 1]])
