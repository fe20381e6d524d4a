import io

import numpy as np
import pytest
from PIL import Image, ImageCms

from eosin.errors import SlideError
from eosin.wsi._array_impl import ArraySlide, open_picture
from eosin.wsi._colour import ManagedSlide, in_srgb
from eosin.wsi._coordinates import read_grid
from eosin.wsi._grid import Tiling
from eosin.wsi._job import JobFolder, tile_slides
from eosin.wsi._slide_file import find_slides, open_slide
from eosin.wsi._tiles import iterate_tiles

TCGA = "tcga-cr-7395-01a-01-ts1.svs"


def srgb_profile():
    return ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def other_profile():
    """Return the profile of a device whose red and blue primaries are each other's."""
    return srgb_profile().replace(b"rXYZ", b"????").replace(b"bXYZ", b"rXYZ").replace(b"????", b"bXYZ")


def test_a_slide_without_a_profile_stays_as_it_is():
    slide = ArraySlide(np.zeros((10, 10, 3), np.uint8), mpp=0.5)
    assert in_srgb(slide) is slide


def test_a_profile_of_srgb_changes_nothing():
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    slide = in_srgb(ArraySlide(pixels, mpp=0.5, icc_profile=srgb_profile()))
    assert isinstance(slide, ManagedSlide)
    assert in_srgb(slide) is slide
    assert np.abs(slide.read((0, 0), (64, 64), 0.5).astype(int) - pixels).max() <= 1
    swapped = in_srgb(ArraySlide(pixels, mpp=0.5, icc_profile=other_profile())).read((0, 0), (64, 64), 0.5)
    assert np.abs(swapped.astype(int) - pixels[..., ::-1]).mean() < 2
    assert slide.facts()["colours"] == "sRGB by ICC profile"


@pytest.mark.parametrize("profile", [b"", b"no profile", srgb_profile()[:200], "LAB"])
def test_a_profile_that_cannot_be_used_is_told(profile):
    if profile == "LAB":
        profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    slide = ArraySlide(np.zeros((10, 10, 3), np.uint8), mpp=0.5, icc_profile=profile)
    with pytest.raises(SlideError, match="leave out --icc") as caught:
        in_srgb(slide)
    assert caught.value.code == "bad-icc"


def test_the_profile_of_a_picture_is_known(tmp_path):
    Image.new("RGB", (20, 20)).save(tmp_path / "a.png", icc_profile=srgb_profile())
    assert open_picture(tmp_path / "a.png", mpp=0.5).icc_profile == srgb_profile()


@pytest.mark.shared
def test_tiles_of_a_real_slide_are_converted_as_pillow_does_it_in_every_thread(shared):
    path = shared / "data" / "slides" / TCGA
    with open_slide(path, mpp=0.25) as slide:
        stored = slide.read((1024, 1024), (256, 256), 0.25)
        assert slide.icc_profile is not None
        profile = ImageCms.ImageCmsProfile(io.BytesIO(slide.icc_profile))
        wanted = ImageCms.profileToProfile(
            Image.fromarray(stored), profile, ImageCms.createProfile("sRGB"), ImageCms.getDefaultIntent(profile)
        )
        managed = in_srgb(slide)
        tile = managed.read((1024, 1024), (256, 256), 0.25)
    assert np.abs(tile.astype(int) - np.asarray(wanted)).max() <= 1


def test_the_tiling_says_so_and_every_reader_of_tiles_follows(tissue_picture, tmp_path):
    path = tmp_path / "a.png"
    Image.fromarray(tissue_picture).save(path, icc_profile=other_profile(), compress_level=1)
    slides = find_slides([path], slide_mpp=0.5)
    tiling = Tiling(icc=True)
    job = JobFolder(tmp_path / "job")
    assert tile_slides(slides, job, tiling).records[0].status == "ok"
    grid = read_grid(job.patches(tiling.folder, slides[0].slide_id))
    assert grid.tiling.icc
    with open_slide(path, mpp=0.5) as slide:
        origin = tuple(grid.origins_px0[0].tolist())
        stored = slide.read(origin, (256, 256), grid.delivered_mpp)
        converted = in_srgb(slide).read(origin, (256, 256), grid.delivered_mpp)
        for threads in (0, 2):
            tiles, _ = next(iterate_tiles(slide, grid, batch_size=4, threads=threads))
            assert np.array_equal(tiles[0], converted)
    assert np.abs(stored[..., ::-1].astype(int) - converted).max() <= 12  # red and blue change places
    assert np.abs(stored.astype(int) - converted).mean() > 10
