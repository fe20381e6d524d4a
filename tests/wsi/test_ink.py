"""Ink by colour and evenness, against the plain formulas."""

import numpy as np
import pytest

from eosin.wsi import _ink as ink
from eosin.wsi import _stain as stain


def pixels(*rgb, glass=(243.0, 243.0, 243.0)):
    """Return the densities of some colours on glass, (3, n)."""
    light = stain.to_light(np.array([rgb], np.uint8), np.array(glass))
    return stain.DENSITY_OF_LIGHT[light[:, 0]]


COLD = {"turquoise": (60, 170, 160), "pale": (200, 228, 226), "blue": (30, 50, 170), "navy": (20, 30, 160)}
STAINS = {
    "eosin": (236, 160, 200),
    "strong eosin": (225, 60, 130),
    "haematoxylin": (120, 90, 160),
    "pale haematoxylin": (212, 216, 232),
    "brown": (150, 100, 60),
    "blood": (190, 60, 75),
    "silver": (60, 55, 50),
}


@pytest.mark.parametrize("colour", COLD.values(), ids=COLD)
def test_green_and_blue_inks_are_told_by_colour(colour):
    assert ink.is_cold(pixels(colour)).all() or ink.is_pale_cold(pixels(colour)).all()


def test_red_ink_is_redder_than_blood():
    assert ink.is_bright_red(pixels((230, 25, 45), (240, 40, 60))).all()
    assert ink.is_pale_red(pixels((242, 130, 140))).all()


@pytest.mark.parametrize("colour", STAINS.values(), ids=STAINS)
def test_no_stain_has_the_colour_of_ink(colour):
    density = pixels(colour)
    assert not ink.is_cold(density).any()
    assert not ink.is_pale_cold(density).any()
    assert not ink.is_bright_red(density).any()


def test_red_is_only_looked_for_where_it_can_be():
    planes = np.random.default_rng(0).integers(0, 256, (3, 200, 300), dtype=np.uint8)
    density = stain.DENSITY_OF_LIGHT[planes].reshape(3, -1)
    perhaps = ink._may_be_red(planes).ravel()
    for rule in (ink.is_bright_red, ink.is_pale_red, ink.is_red):
        found = rule(density)
        assert found.sum() > 50
        assert not (found & ~perhaps).any()


@pytest.mark.parametrize("light", [20, 50, 80])
def test_even_is_a_variation_of_two_per_cent(light):
    rng = np.random.default_rng(light)
    density = stain.DENSITY_OF_LIGHT[light]
    for share, expected in ((0.008, True), (0.05, False)):
        varied = 256 * 10.0 ** -(density * (1 + share * rng.normal(size=(120, 120)))) - 1
        plane = varied.round().clip(0, 255).astype(np.uint8)
        found = ink.find_even(plane, stain.bends_of(plane))
        assert found.mean() > 0.95 if expected else found.mean() < 0.05
