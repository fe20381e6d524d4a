"""The order of values is seen over any tissue: in grey prints, and with any colour vision."""

import numpy as np
import pytest
from scenes import lattice

from eosin.heatmaps._colour import ColourScale, pale_grey, scale_of
from eosin.heatmaps._heatmap import Heatmap
from eosin.heatmaps.export._png import OPACITY

SIGNED = ColourScale(-4.0, 4.0, "signed", "against", "for", "evidence")
WEIGHTS = ColourScale(1.0, 10.0, "viridis", "average", "10 times", "attention")
# Viénot, Brettel and Mollon 1999, linear RGB
SIGHT = {
    "usual": np.eye(3),
    "deuteranopia": np.array([[0.29275, 0.70725, 0.0], [0.29275, 0.70725, 0.0], [-0.02234, 0.02234, 1.0]]),
    "protanopia": np.array([[0.11238, 0.88762, 0.0], [0.11238, 0.88762, 0.0], [0.00401, -0.00401, 1.0]]),
}


def lightness(rgb, sight="usual"):
    """Return L* of CIELAB, 0 to 100."""
    part = np.asarray(rgb, float) / 255
    linear = np.where(part <= 0.04045, part / 12.92, ((part + 0.055) / 1.055) ** 2.4)
    luminance = np.clip(linear @ SIGHT[sight].T, 0, 1) @ [0.2126, 0.7152, 0.0722]
    return 116 * np.where(luminance > 0.008856, np.cbrt(luminance), luminance / 0.1284 + 4 / 29) - 16


def tissue():
    """Pixels of stained tissue from dark nuclei to fat, and their ground: (n, 1, 1)."""
    stain = np.array([[40, 20, 70], [90, 60, 130], [150, 80, 140], [200, 110, 160], [225, 170, 205], [236, 228, 236]])
    return pale_grey(stain[:, None].astype(np.uint8))[:, 0]


@pytest.mark.parametrize("sight", SIGHT)
@pytest.mark.parametrize(("scale", "sign"), [(SIGNED, -1), (WEIGHTS, 1)])
def test_lightness_has_the_order_of_values_over_every_tissue(scale, sign, sight):
    values = np.linspace(scale.low, scale.high, 101)
    for ground in tissue():
        seen = lightness(scale.over(ground, values, opacity=OPACITY), sight)
        assert (sign * np.diff(seen) >= -0.05).all(), ground
        assert sign * (seen[-1] - seen[0]) > 15


@pytest.mark.parametrize("sight", SIGHT)
def test_strong_evidence_on_pale_tissue_is_darker_than_none_on_dark_tissue(sight):
    dark, *_, pale = tissue()[1:]
    strong = lightness(SIGNED.over(pale, np.array([4.0]), opacity=OPACITY), sight)
    none = lightness(SIGNED.over(dark, np.array([0.0]), opacity=OPACITY), sight)
    assert strong < none


def test_zero_shows_the_tissue_and_legends_show_the_picture():
    ground = np.full(1, 170.0)
    np.testing.assert_allclose(SIGNED.over(ground, np.array([0.0]), opacity=1.0), [[170, 170, 170]])
    stops = SIGNED.stops(3, opacity=OPACITY, ground=170 / 255)
    shown = SIGNED.over(ground, np.array([-4.0, 0.0, 4.0]), opacity=OPACITY).round().astype(int)
    assert stops == ["#{:02x}{:02x}{:02x}".format(*rgb) for rgb in shown]


def test_weights_have_one_scale_on_all_slides_dark_up_to_the_mean():
    grid = lattice(size_px0=(640, 480), slide_mpp=0.5)
    rng = np.random.default_rng(0)
    for spread in (0.1, 3.0):
        values = rng.dirichlet(np.full(grid.n_tiles, 1 / spread))
        plain = Heatmap(values, grid, "attention", "attention")
        scale, relative = scale_of(plain), scale_of(plain.relative())
        assert (relative.low, relative.high) == (1.0, 10.0)
        np.testing.assert_array_equal(scale.rgb(values), relative.rgb(plain.relative().values))
        below = scale.rgb(values[values < 1 / grid.n_tiles])
        assert (below == scale.rgb(np.array([scale.low]))).all()
