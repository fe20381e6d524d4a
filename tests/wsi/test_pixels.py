import numpy as np
import pytest
from PIL import Image

from eosin.wsi import _pixels as pixels
from eosin.wsi._pixels import choose_level, flatten, read_scaled


def reader(*levels):
    """Read levels from arrays; outside is white."""

    def read_level(level, corner, size):
        stored = levels[level]
        out = np.full((size[1], size[0], 3), 255, np.uint8)
        (x, y), (w, h) = corner, size
        x0, y0, x1, y1 = max(x, 0), max(y, 0), min(x + w, stored.shape[1]), min(y + h, stored.shape[0])
        if x1 > x0 and y1 > y0:
            out[y0 - y : y1 - y, x0 - x : x1 - x] = stored[y0:y1, x0:x1]
        return out

    return read_level


@pytest.fixture(scope="module")
def noise():
    return np.random.default_rng(1).integers(0, 256, (700, 900, 3), dtype=np.uint8)


def test_transparent_pixels_become_background_and_half_transparent_ones_mix():
    rgba = np.zeros((1, 3, 4), np.uint8)
    rgba[0, :, 3] = 0, 128, 255
    found = flatten(Image.fromarray(rgba), (200, 100, 50))
    assert found[0, 0].tolist() == [200, 100, 50]
    assert np.abs(found[0, 1].astype(int) - [100, 50, 25]).max() <= 1
    assert found[0, 2].tolist() == [0, 0, 0]


def test_native_pixels_are_delivered_as_stored(noise):
    found = read_scaled(reader(noise), [1.0], (100, 50), (256, 200), 1.0)
    assert np.array_equal(found, noise[50:250, 100:356])


def test_a_level_within_half_a_pixel_over_the_region_is_not_resampled(noise):
    small = noise[::2, ::2]
    found = read_scaled(reader(noise, small), [1.0, 2.0005], (40, 40), (256, 256), 2.0)
    assert np.array_equal(found, small[20:276, 20:276])


def test_a_whole_ratio_is_the_area_average(noise):
    found = read_scaled(reader(noise), [1.0], (16, 32), (100, 60), 4.0)
    cells = noise[32 : 32 + 240, 16 : 16 + 400].reshape(60, 4, 100, 4, 3).mean(axis=(1, 3))
    assert np.abs(found - cells).max() <= 0.5 + 1e-6


def test_the_next_finer_level_is_used_not_the_finest(noise):
    wrong = np.zeros_like(noise)
    half = np.asarray(Image.fromarray(noise).reduce(2))
    found = read_scaled(reader(wrong, half), [1.0, 2.0], (0, 0), (50, 50), 4.0)
    assert found.mean() > 100


@pytest.mark.parametrize("ratio", [1.37, 1.98, 2.51, 7.3])
def test_between_levels_a_ramp_keeps_its_place(ratio):
    ramp = np.broadcast_to((np.arange(900) * 0.25)[None, :, None], (60, 900, 3)).astype(np.uint8)
    size = (int(600 / ratio), 4)
    found = read_scaled(reader(ramp), [1.0], (100.0, 10.0), size, ratio)
    centres = 100 + (np.arange(size[0]) + 0.5) * ratio - 0.5
    assert np.abs(found[2, :, 0] - centres * 0.25).max() < 1.3


@pytest.mark.parametrize("ratio", [1 / 1.1, 0.75, 1.37, 2.0, 3.0, 2.51])
def test_pixels_do_not_depend_on_how_the_region_is_cut(noise, ratio):
    whole = read_scaled(reader(noise), [1.0], (20, 30), (200, 100), ratio)
    right = read_scaled(reader(noise), [1.0], (20 + 100 * ratio, 30 + 40 * ratio), (100, 60), ratio)
    difference = np.abs(whole[40:, 100:].astype(int) - right)
    # Pillow rounds the filter's weights anew for each cut; the cubic filter, for enlarging, has larger ones
    assert difference.max() <= (0 if ratio in (2.0, 3.0) else 1 if ratio > 1 else 2)


@pytest.mark.parametrize("ratio", [2.0, 2.51])
def test_large_regions_are_read_in_blocks_with_the_same_pixels(noise, ratio, monkeypatch):
    whole = read_scaled(reader(noise), [1.0], (3, 5), (250, 200), ratio)
    sizes = []

    def watched(level, corner, size):
        sizes.append(size[0] * size[1])
        return reader(noise)(level, corner, size)

    monkeypatch.setattr(pixels, "BLOCK_PX", 128)
    blocks = read_scaled(watched, [1.0], (3, 5), (250, 200), ratio)
    assert max(sizes) <= 140**2
    assert np.abs(whole.astype(int) - blocks).max() <= 1


@pytest.mark.parametrize(
    ("wanted", "level"), [(0.98, 0), (1.0, 0), (1.99, 0), (1.9985, 1), (2.0, 1), (3.9, 1), (4.1, 2), (100, 2)]
)
def test_level_choice(wanted, level):
    assert choose_level([1.0, 2.0, 4.016], wanted, 256) == level


def test_upsampling_interpolates(noise):
    found = read_scaled(reader(noise), [1.0], (10, 10), (110, 110), 1 / 1.1)
    assert found.shape == (110, 110, 3)
    assert abs(found.mean() - noise[10:110, 10:110].mean()) < 2
