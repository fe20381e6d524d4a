import numpy as np
import pytest
from PIL import Image

from eosin.errors import MissingResolutionError, SlideOpenError
from eosin.wsi import _array_impl as array_impl
from eosin.wsi._array_impl import ArraySlide, open_picture
from eosin.wsi._slide_file import open_slide


def test_an_array_is_a_slide(tissue_picture):
    with ArraySlide(tissue_picture, mpp=0.25) as slide:
        assert slide.size_px0 == (1600, 1200)
        found = slide.read((1590, -5), (20, 10), 0.25)
        assert np.array_equal(found[5:, :10], tissue_picture[:5, 1590:])
        assert (found[:5] == 255).all()
        assert (found[:, 10:] == 255).all()
        assert slide.read((0, 0), (400, 300), 1.0).shape == (300, 400, 3)
        assert (slide.read((5000, 5000), (4, 4), 0.25) == 255).all()


def test_an_array_without_mpp_or_of_another_kind_is_refused(tissue_picture):
    with pytest.raises(MissingResolutionError):
        ArraySlide(tissue_picture, mpp=None).read((0, 0), (4, 4), 0.5)
    with pytest.raises(ValueError, match="uint8"):
        ArraySlide(tissue_picture.astype(np.float32), mpp=0.5)


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".jpeg"])
def test_pictures_are_slides_whose_mpp_the_user_states(tissue_picture, tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    Image.fromarray(tissue_picture).save(path, dpi=(72, 72))
    with open_slide(path) as slide, pytest.raises(MissingResolutionError, match="--slide-mpp"):
        slide.read((0, 0), (10, 10), 0.5)
    with open_slide(path, mpp=0.5) as slide:
        found = slide.read((700, 600), (64, 64), 0.5)
    assert np.abs(found.astype(int) - tissue_picture[600:664, 700:764]).mean() < (0.01 if suffix == ".png" else 12)


def test_transparent_pictures_lie_on_white(tmp_path):
    Image.new("RGBA", (20, 20), (255, 0, 0, 0)).save(tmp_path / "a.png")
    with open_slide(tmp_path / "a.png", mpp=0.5) as slide:
        assert (slide.read((0, 0), (20, 20), 0.5) == 255).all()


def test_damaged_foreign_and_giant_pictures_are_refused(tmp_path, tissue_picture, monkeypatch):
    (tmp_path / "a.png").write_bytes(b"no picture")
    with pytest.raises(SlideOpenError) as caught:
        open_slide(tmp_path / "a.png")
    assert caught.value.code == "unsupported"
    Image.fromarray(tissue_picture).save(tmp_path / "b.png")
    whole = (tmp_path / "b.png").read_bytes()
    (tmp_path / "b.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(SlideOpenError, match="damaged"):
        open_slide(tmp_path / "b.png")
    (tmp_path / "b.png").write_bytes(whole)
    monkeypatch.setattr(array_impl, "MAX_PICTURE_PX", 1000)
    with pytest.raises(SlideOpenError, match="vips tiffsave"):
        open_slide(tmp_path / "b.png")


@pytest.mark.parametrize("size", [(10_000, 8_100), (20_000, 10_000)])
def test_a_picture_that_is_too_large_is_refused_with_the_conversion(tmp_path, size):
    path = tmp_path / "large.png"
    Image.new("1", size).save(path)
    with pytest.raises(SlideOpenError, match=r"vips tiffsave large\.png") as caught:
        open_picture(path)
    assert caught.value.code == "untiled"
