"""Levels that are not where their sizes say, or show something else."""

import time

import numpy as np
import pytest
import tifffile
from PIL import Image

from eosin.errors import SlideError
from eosin.wsi._slide_file import open_slide
from eosin.wsi._synthetic import make_slide

CM = {"resolution": (2e4, 2e4), "resolutionunit": "CENTIMETER"}


@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    """Return (1500, 2300, 3): a painted slide, whose texture does not repeat itself."""
    path = tmp_path_factory.mktemp("scene") / "a.tiff"
    make_slide(path, size_px0=(2300, 1500), mpp=0.5, seed=4)
    with open_slide(path) as slide:
        return slide.read_level(0, (0, 0), (2300, 1500)).copy()


def write(path, *levels, flags=None, compression="jpeg", tile=256):
    options = {"photometric": "rgb", "compression": compression, "tile": (tile, tile), "metadata": None}
    with tifffile.TiffWriter(path) as tiff:
        for number, level in enumerate(levels):
            reduced = number > 0 if flags is None else flags[number]
            tiff.write(np.ascontiguousarray(level), subfiletype=int(reduced), **options, **({} if number else CM))
    return path


def reduced(picture, factor):
    return np.asarray(Image.fromarray(picture).reduce(factor))[
        : picture.shape[0] // factor, : picture.shape[1] // factor
    ]


def padded(picture, tile=256, *, before=(0, 0)):
    """Return a level filled up to whole tiles, `before` px of it to the left and above."""
    x, y = before
    height, width = (-(-(side + more) // tile) * tile for side, more in zip(picture.shape[:2], (y, x), strict=True))
    canvas = np.full((height, width, 3), 255, np.uint8)
    canvas[y : y + picture.shape[0], x : x + picture.shape[1]] = picture
    return canvas


@pytest.mark.parametrize("compression", ["jpeg", "deflate"])
def test_exact_levels_stay_as_their_sizes_say(tmp_path, scene, compression):
    path = write(tmp_path / "a.tif", scene, *(reduced(scene, factor) for factor in (2, 4, 8)), compression=compression)
    with open_slide(path) as slide:
        assert slide.downsamples == [1.0, 2.0, 4.0, 8.0]
        assert slide.residual_px0 < 1
        assert slide.notes == []
        assert slide.facts()["level_residual_px0"] == round(slide.residual_px0, 2)


def test_levels_padded_to_whole_tiles_get_their_true_scale(tmp_path, scene):
    path = write(tmp_path / "a.tif", scene, *(padded(reduced(scene, factor)) for factor in (2, 4, 8)))
    with open_slide(path) as slide:
        assert slide.downsamples == [1.0, 2.0, 4.0, 8.0]
        assert slide.offsets_px0 == [(0.0, 0.0)] * 4
        assert slide.residual_px0 < 2
        assert "the scales 2, 4, 8 were measured and used" in slide.notes[0]
        found = slide.read((800, 600), (150, 150), 2.0)
    cells = scene[600:1200, 800:1400].reshape(150, 4, 150, 4, 3).mean(axis=(1, 3))
    assert np.abs(found - cells).mean() < 4


def test_a_level_padded_on_its_left_gets_its_offset(tmp_path, scene):
    path = write(tmp_path / "a.tif", scene, padded(reduced(scene, 4), before=(37, 21)))
    with open_slide(path) as slide:
        assert slide.downsamples[1] == pytest.approx(4.0, rel=2e-3)
        assert np.abs(np.add(slide.offsets_px0[1], (4 * 37, 4 * 21))).max() < 3
        found = slide.read((800, 600), (150, 150), 2.0)
    cells = scene[600:1200, 800:1400].reshape(150, 4, 150, 4, 3).mean(axis=(1, 3))
    assert np.abs(found - cells).mean() < 6


def test_a_level_of_another_picture_fails_the_slide(tmp_path, scene):
    path = write(tmp_path / "a.tif", scene, reduced(scene[::-1, ::-1], 2))
    with pytest.raises(SlideError, match="level 1 of its pyramid shows another picture") as caught:
        open_slide(path)
    assert caught.value.code == "bad-pyramid"
    assert "vips tiffsave a.tif" in caught.value.message


def test_a_page_that_is_only_of_the_slides_shape_is_left_out(tmp_path, scene):
    path = write(
        tmp_path / "a.tif", reduced(scene[::-1, ::-1], 4), scene, reduced(scene, 2), flags=(False, False, True)
    )
    with open_slide(path, mpp=0.5) as slide:
        assert slide.downsamples == [1.0, 2.0]
        assert "another content were left out" in slide.notes[0]
        assert slide.read((0, 0), (575, 375), 2.0).shape == (375, 575, 3)


def test_a_copy_that_is_not_called_one_is_used(tmp_path, scene):
    path = write(tmp_path / "a.tif", reduced(scene, 4), scene, flags=(False, False))
    with open_slide(path) as slide:
        assert slide.downsamples == [1.0, 4.0]
        assert slide.notes == []


def test_a_blank_slide_has_nothing_to_compare(tmp_path):
    blank = np.full((1500, 2300, 3), 243, np.uint8)
    path = write(tmp_path / "a.tif", blank, padded(reduced(blank, 2)), reduced(blank, 4))
    with open_slide(path) as slide:
        assert slide.residual_px0 is None
        assert slide.downsamples == [1.0, 4.0]  # a padded level that cannot be placed is not needed


def test_what_repeats_itself_is_where_it_is_expected(giant_slide):
    path = giant_slide("repeats.tiff", 20_000, mpp=0.25, n_levels=4)
    with open_slide(path) as slide:
        assert slide.downsamples == [1.0, 4.0, 16.0, 64.0]


def test_measuring_takes_less_than_50_ms_of_an_ordinary_pyramid(tmp_path, scene):
    path = write(tmp_path / "a.tif", scene, *(reduced(scene, factor) for factor in (2, 4, 8)))
    open_slide(path).close()
    times = []
    for _ in range(5):
        start = time.process_time()
        open_slide(path).close()
        times.append(time.process_time() - start)
    assert min(times) < 0.05
