import numpy as np
import openslide
import pytest
import tifffile
from scenes import lattice, marked_map

from eosin.errors import ConfigError
from eosin.heatmaps._colour import scale_of
from eosin.heatmaps._heatmap import Heatmap
from eosin.heatmaps.export._tiff import default_mpp, write_tiff
from eosin.wsi._slide_file import open_slide


def lit_boxes(path, colour):
    """Bounding box of the lit pixels in each level, in level-0 pixels of the file."""
    with openslide.OpenSlide(path) as slide:
        boxes = []
        for level, (size, down) in enumerate(zip(slide.level_dimensions, slide.level_downsamples, strict=True)):
            pixels = np.asarray(slide.read_region((0, 0), level, size))[..., :3].astype(int)
            ys, xs = np.nonzero(np.abs(pixels - colour).sum(-1) < 9)
            boxes.append(np.array([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]) * down)
        return boxes


@pytest.mark.parametrize("slide_mpp", [0.25, 0.5, 1.0])
@pytest.mark.parametrize("map_mpp", [None, 1.3])
def test_marked_tile_lights_up_in_every_level(tmp_path, slide_mpp, map_mpp):
    grid = lattice(size_px0=(3011, 2207), slide_mpp=slide_mpp, mpp=slide_mpp, patch_size=160)
    tile = grid.n_tiles // 2 + 3
    heatmap = marked_map(grid, tile)
    write_tiff(tmp_path / "map.tiff", heatmap, mpp=map_mpp)

    mpp = map_mpp or default_mpp(heatmap)
    top = scale_of(heatmap).rgb(np.array([1.0]))[0].astype(int)
    expected = grid.boxes_px0()[tile] * slide_mpp / mpp
    boxes = lit_boxes(tmp_path / "map.tiff", top)
    for level, box in enumerate(boxes):
        assert np.abs(box - expected).max() <= 2**level + 1


def test_opens_in_openslide_with_levels_and_resolution(tmp_path):
    grid = lattice(size_px0=(30_000, 20_000), slide_mpp=0.25, mpp=0.5, patch_size=256)
    heatmap = marked_map(grid, 5)
    write_tiff(tmp_path / "map.tiff", heatmap)
    assert default_mpp(heatmap) == 8.0
    with openslide.OpenSlide(tmp_path / "map.tiff") as slide:
        assert slide.properties["openslide.vendor"] == "generic-tiff"
        assert slide.dimensions == (938, 625)
        assert slide.level_count == 3
        assert [round(down) for down in slide.level_downsamples] == [1, 2, 4]
        assert float(slide.properties["openslide.mpp-x"]) == pytest.approx(8.0, rel=1e-3)
        assert float(slide.properties["openslide.mpp-y"]) == pytest.approx(8.0, rel=1e-3)
    with open_slide(tmp_path / "map.tiff") as slide:
        assert slide.mpp == pytest.approx(8.0, rel=1e-3)


def test_colours_are_those_of_the_scale_and_white_outside(tmp_path):
    grid = lattice(size_px0=(640, 640), slide_mpp=0.5, patch_size=64).select(np.arange(0, 100, 3))
    heatmap = Heatmap(np.linspace(-1, 1, grid.n_tiles), grid, "effect", "effect", signed=True)
    write_tiff(tmp_path / "map.tiff", heatmap, mpp=0.5)
    pixels = tifffile.imread(tmp_path / "map.tiff")
    assert np.array_equal(pixels, scale_of(heatmap).rgb(heatmap.raster(0.5)))
    assert (pixels[:64, 64:128] == 255).all()


def test_scores_are_kept_as_numbers(tmp_path):
    grid = lattice(size_px0=(1280, 900), slide_mpp=0.5, patch_size=64, overlap=32)
    values = np.random.default_rng(0).normal(size=grid.n_tiles)
    heatmap = Heatmap(values, grid, "effect", "effect", signed=True)
    write_tiff(tmp_path / "map.tiff", heatmap, content="scores", mpp=2.0)
    with tifffile.TiffFile(tmp_path / "map.tiff") as tiff:
        assert [bool(page.is_reduced) for page in tiff.pages] == [False, True]
        np.testing.assert_array_equal(tiff.pages[0].asarray(), heatmap.raster(2.0))
        np.testing.assert_array_equal(tiff.pages[1].asarray(), heatmap.raster(4.0))


def test_scanned_box_is_the_picture(tmp_path):
    grid = lattice(size_px0=(1200, 900), slide_mpp=0.5, patch_size=60)
    tile = 7 * 20 + 11
    heatmap = marked_map(grid, tile)
    write_tiff(tmp_path / "map.tiff", heatmap, mpp=0.5, window_px0=(307, 211, 701, 503))
    top = scale_of(heatmap).rgb(np.array([1.0]))[0].astype(int)
    (box, *_) = lit_boxes(tmp_path / "map.tiff", top)
    assert box.tolist() == (grid.boxes_px0()[tile] - [307, 211, 307, 211]).tolist()


def test_picture_that_is_too_large_is_refused(tmp_path):
    grid = lattice(size_px0=(200_000, 100_000), slide_mpp=0.25, mpp=4.0, patch_size=512)
    with pytest.raises(ConfigError, match="larger mpp"):
        write_tiff(tmp_path / "map.tiff", marked_map(grid, 0), mpp=0.25)
    assert not list(tmp_path.iterdir())
