import numpy as np
import openslide
import pytest
import tifffile

from eosin.errors import CorruptSlideError, MissingResolutionError
from eosin.wsi._openslide_impl import OpenSlideSlide


def test_pixels_mpp_and_facts(write_slide, tissue_picture):
    with OpenSlideSlide(write_slide("a.tiff", tissue_picture, mpp=0.25, levels=(4,))) as slide:
        assert slide.size_px0 == (1600, 1200)
        assert slide.mpp == pytest.approx(0.25, rel=1e-4)
        assert slide.mpp_source == "openslide.mpp-x"
        assert slide.bounds_px0 is None
        found = slide.read((300, 200), (256, 128), slide.mpp)
        assert slide.facts()["level_downsamples"] == [1.0, 4.0]
    assert np.array_equal(found, tissue_picture[200:328, 300:556])


def test_coarser_pixels_come_from_the_level_that_has_them(write_slide, tissue_picture):
    with OpenSlideSlide(write_slide("a.tiff", tissue_picture, mpp=0.25, levels=(4,))) as slide:
        found = slide.read((400, 400), (100, 100), 1.0)
        half = slide.read((400, 400), (100, 100), 0.5)
    cells = tissue_picture[400:800, 400:800].reshape(100, 4, 100, 4, 3).mean(axis=(1, 3))
    assert np.abs(found - cells).max() <= 1
    cells = tissue_picture[400:600, 400:600].reshape(100, 2, 100, 2, 3).mean(axis=(1, 3))
    assert np.abs(half - cells).max() <= 1


def test_outside_the_slide_is_background(write_slide, tissue_picture):
    with OpenSlideSlide(write_slide("a.tiff", tissue_picture)) as slide:
        found = slide.read((-10, 1190), (20, 20), slide.mpp)
    assert (found[:, :10] == 255).all()
    assert (found[10:] == 255).all()
    assert np.array_equal(found[:10, 10:], tissue_picture[1190:, :10])


def test_the_users_mpp_scales_reads(write_slide, tissue_picture):
    with OpenSlideSlide(write_slide("a.tiff", tissue_picture, mpp=None), mpp=0.25) as slide:
        assert (slide.mpp, slide.mpp_source) == (0.25, "user")
        assert slide.read((0, 0), (10, 10), 0.5).shape == (10, 10, 3)


def test_without_mpp_reading_is_refused(write_slide, tissue_picture):
    with OpenSlideSlide(write_slide("a.tiff", tissue_picture, mpp=None)) as slide:
        assert slide.facts()["mpp"] is None
        with pytest.raises(MissingResolutionError, match="--slide-mpp"):
            slide.read((0, 0), (10, 10), 0.5)


def test_missing_tiles_are_background(write_slide, tissue_picture):
    path = write_slide("a.tiff", tissue_picture)
    with tifffile.TiffFile(path, mode="r+") as tiff:
        counts, offsets = (list(tiff.pages[0].tags[name].value) for name in ("TileByteCounts", "TileOffsets"))
        counts[0] = offsets[0] = 0
        tiff.pages[0].tags["TileByteCounts"].overwrite(counts)
        tiff.pages[0].tags["TileOffsets"].overwrite(offsets)
    with OpenSlideSlide(path) as slide:
        found = slide.read((0, 0), (300, 300), slide.mpp)
    assert (found[:256, :256] == 255).all()
    assert np.array_equal(found[:256, 256:], tissue_picture[:256, 256:300])


def test_damaged_pixels_are_an_error_with_their_place_and_the_rest_stays_readable(write_slide, tissue_picture):
    path = write_slide("a.tiff", tissue_picture)
    with tifffile.TiffFile(path) as tiff:
        offset = tiff.pages[0].dataoffsets[0]
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(b"\xff" * 64)
    with OpenSlideSlide(path) as slide:
        for _ in range(2):
            with pytest.raises(CorruptSlideError, match=r"level 0, 64 x 64 px at level-0 \(10, 20\)") as caught:
                slide.read((10, 20), (64, 64), slide.mpp)
            assert caught.value.code == "corrupt"
            found = slide.read((512, 512), (64, 64), slide.mpp)
            assert np.array_equal(found, tissue_picture[512:576, 512:576])


def test_facts_tell_nothing_private(write_slide, tissue_picture):
    path = write_slide("a.tiff", tissue_picture, description="Jane Doe 1970-01-01")
    with OpenSlideSlide(path) as slide:
        assert "Jane" in slide._handle.properties["openslide.comment"]
        assert "Jane" not in str(slide.facts())


def test_associated_images_are_never_read(write_slide, tissue_picture, monkeypatch):
    def refuse(self):
        raise AssertionError("label and macro images must not be touched")

    monkeypatch.setattr(openslide.OpenSlide, "associated_images", property(refuse))
    with OpenSlideSlide(write_slide("a.tiff", tissue_picture)) as slide:
        slide.read((0, 0), (10, 10), slide.mpp)
        slide.facts()
