import numpy as np
import pytest
from PIL import Image
from scenes import MARK, PixelSlide, lattice, marked_map, marked_pixels, write_slide
from shapely import MultiPolygon, box

from eosin.heatmaps._colour import scale_of
from eosin.heatmaps.export._png import (
    COLOUR_BAR_PX,
    MARGIN_PX,
    TRUTH_COLOUR,
    Contour,
    blend,
    draw,
    scale_bar_um,
    take_view,
    write_png,
)
from eosin.wsi._slide_file import open_slide
from eosin.wsi._tissue import TissueMask


def lit_box(image):
    """Bounding box of the yellow pixels that only the top of the scale has: x0, y0, x1, y1."""
    yellow = (image[..., 0].astype(int) - image[..., 2] > 70) & (image[..., 1].astype(int) - image[..., 2] > 70)
    return extent(yellow)


def extent(mask):
    ys, xs = np.nonzero(mask)
    return np.array([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1])


def dark_box(image):
    return extent(np.abs(image.astype(int) - MARK).sum(-1) < 60)


@pytest.mark.parametrize("slide_mpp", [0.25, 0.5, 1.0])
@pytest.mark.parametrize("downsamples", [(3,), (5, 7)])
@pytest.mark.parametrize("longest_px", [301, 4000])
def test_overlay_lights_up_on_the_marked_pixels(tmp_path, slide_mpp, downsamples, longest_px):
    grid = lattice(size_px0=(1403, 1101), slide_mpp=slide_mpp, mpp=slide_mpp, patch_size=72)
    tile = grid.n_tiles // 3
    write_slide(tmp_path / "slide.tiff", marked_pixels(grid, tile), mpp=slide_mpp, downsamples=downsamples)
    heatmap = marked_map(grid, tile).percentile()
    with open_slide(tmp_path / "slide.tiff") as slide:
        view = take_view(slide, longest_px=longest_px)
    overlay = blend(view, heatmap, scale_of(heatmap))

    assert np.abs(lit_box(overlay) - dark_box(view.image)).max() <= 1
    expected = grid.boxes_px0()[tile] * view.slide_mpp / view.mpp
    assert np.abs(lit_box(overlay) - expected).max() <= 1


def test_scanned_box_is_shown_and_the_map_follows():
    grid = lattice(size_px0=(1200, 900), slide_mpp=0.5, patch_size=60)
    tile = 7 * 20 + 11
    slide = PixelSlide(marked_pixels(grid, tile), 0.5, bounds_px0=(307, 211, 701, 503))
    view = take_view(slide, longest_px=350)
    heatmap = marked_map(grid, tile).percentile()
    overlay = blend(view, heatmap, scale_of(heatmap))

    assert view.image.shape == (252, 350, 3)
    assert np.abs(lit_box(overlay) - dark_box(view.image)).max() <= 1
    x0, y0, x1, y1 = grid.boxes_px0()[tile] - (307, 211, 307, 211)
    assert np.abs(lit_box(overlay) - np.array([x0, y0, x1, y1]) * 350 / 701).max() <= 1.5


def test_written_picture_lights_up_there_and_is_blank_elsewhere(tmp_path):
    grid = lattice(size_px0=(640, 480), slide_mpp=0.5, patch_size=40)
    tile = 5 * 16 + 9
    kept = [index for index in range(grid.n_tiles) if index % 16 > 3]
    heatmap = marked_map(grid.select(kept), kept.index(tile)).percentile()
    view = take_view(PixelSlide(marked_pixels(grid, tile), 0.5))
    write_png(tmp_path / "map.png", view, heatmap, title="a title")

    image = np.asarray(Image.open(tmp_path / "map.png"))
    top = image.shape[0] - MARGIN_PX - 480
    left = image.shape[1] - COLOUR_BAR_PX - 640
    overlay = image[top : top + 480, left : left + 640]
    assert np.abs(lit_box(overlay) - grid.boxes_px0()[tile]).max() == 0
    blank = overlay[:400, : 4 * 40]  # the scale bar lies below
    assert (blank.max(-1) == blank.min(-1)).all()
    slide = image[top : top + 480, MARGIN_PX : MARGIN_PX + 640]
    assert np.array_equal(slide[:400], view.image[:400])


def test_overlay_is_blank_outside_tissue():
    grid = lattice(size_px0=(640, 480), slide_mpp=0.5, patch_size=40)
    view = take_view(PixelSlide(marked_pixels(grid, 0), 0.5))
    mask = np.zeros((30, 40), dtype=bool)
    mask[10:20, 12:28] = True
    tissue = TissueMask(mask, (16.0, 16.0), (640, 480), 0.5)
    overlay = blend(view, marked_map(grid, 0).percentile(), scale_of(marked_map(grid, 0)), tissue=tissue)
    coloured = overlay.max(-1) != overlay.min(-1)
    assert extent(coloured).tolist() == [192, 160, 448, 320]
    assert coloured[160:320, 192:448].all()


def test_outline_is_drawn_where_the_truth_is():
    view = take_view(PixelSlide(np.full((400, 600, 3), 240, np.uint8), 0.5))
    contour = Contour(MultiPolygon([box(100, 50, 300, 250)]), TRUTH_COLOUR, "truth")
    image = draw(view, view.image, contours=[contour], scale_bar=False)
    assert image.shape == view.image.shape
    dark = image.max(-1) < 60
    assert np.abs(extent(dark) - [100, 50, 300, 250]).max() <= 1
    assert not dark[60:240, 110:290].any()


def test_scale_bar_has_the_length_it_states():
    view = take_view(PixelSlide(np.full((400, 900, 3), 240, np.uint8), 0.5))
    image = draw(view, view.image)
    black = image.max(-1) < 80
    row = black.sum(1).argmax()
    assert scale_bar_um(900 * 0.5) == 100
    assert abs(black[row].sum() - 100 / 0.5) <= 2


@pytest.mark.parametrize(("width_um", "expected"), [(4.0, 1), (450, 100), (20_000, 5000), (7.9, 1), (800, 200)])
def test_scale_bar_is_a_round_number(width_um, expected):
    assert scale_bar_um(width_um) == pytest.approx(expected)
