import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scenes import lattice, marked_map

from eosin.heatmaps._heatmap import Heatmap, raster_boxes, raster_shape
from eosin.wsi._grid import TileGrid, Tiling


@pytest.mark.parametrize("tiling_mpp", [0.25, 0.5, 1.0])
@pytest.mark.parametrize("slide_mpp", [0.25, 0.2428])
@pytest.mark.parametrize("raster_mpp", [0.25, 0.5, 1.0, 1.7])
def test_marked_tile_covers_its_pixels_and_no_others(tiling_mpp, slide_mpp, raster_mpp):
    grid = lattice(size_px0=(1213, 901), slide_mpp=slide_mpp, mpp=tiling_mpp, patch_size=32)
    tile = grid.n_tiles // 2 + 1
    plane = marked_map(grid, tile).raster(raster_mpp)

    assert plane.shape == raster_shape(grid, raster_mpp)
    height, width = plane.shape
    centre_x = (np.arange(width) + 0.5) * raster_mpp / slide_mpp
    centre_y = (np.arange(height) + 0.5) * raster_mpp / slide_mpp
    x0, y0, x1, y1 = grid.boxes_px0()[tile]
    for slack, expected in ((-1, True), (1, False)):  # at most one level-0 pixel of rounding at each edge
        inside_x = (centre_x > x0 - slack) & (centre_x < x1 + slack)
        inside_y = (centre_y > y0 - slack) & (centre_y < y1 + slack)
        inside = inside_y[:, None] & inside_x[None, :]
        lit = plane == 1
        assert (lit[inside]).all() if expected else not lit[~inside].any()


@pytest.mark.parametrize("slide_mpp", [0.2428, 0.2416])  # 67.96 and 68.29 pixels from tile to tile, each of 68
def test_neighbours_leave_no_line_between_them(slide_mpp):
    grid = lattice(size_px0=(2001, 1501), slide_mpp=slide_mpp, mpp=0.5, patch_size=33)
    plane = Heatmap(np.ones(grid.n_tiles), grid, "attention", "attention").raster(slide_mpp)
    boxes = grid.boxes_px0()
    covered = plane[boxes[:, 1].min() : boxes[:, 3].max(), boxes[:, 0].min() : boxes[:, 2].max()]
    assert not np.isnan(covered).any()


def test_blank_where_no_tile_lies():
    grid = lattice(size_px0=(1000, 1000), slide_mpp=0.5, patch_size=100).select([0, 55])
    plane = Heatmap(np.array([3.0, 5.0]), grid, "attention", "attention").raster(0.5)
    assert np.unique(plane[~np.isnan(plane)]).tolist() == [3.0, 5.0]
    assert np.isfinite(plane).sum() == 2 * 100 * 100
    assert (plane[500:600, 500:600] == 5).all()


def test_overlap_gives_the_mean():
    tiling = Tiling(mpp=1.0, patch_size=10, overlap=5)
    grid = TileGrid(np.array([[0, 0], [5, 0]]), 10, tiling, (20, 10), 1.0)
    plane = Heatmap(np.array([1.0, 3.0]), grid, "attention", "attention").raster(1.0)
    assert plane[0, :5].tolist() == [1.0] * 5
    assert plane[0, 5:10].tolist() == [2.0] * 5
    assert plane[0, 10:15].tolist() == [3.0] * 5
    assert np.isnan(plane[0, 15:]).all()


def test_tile_smaller_than_a_pixel_still_marks_one():
    grid = lattice(size_px0=(10_000, 8_000), slide_mpp=0.25, mpp=0.25, patch_size=16)
    tile = 1234
    plane = marked_map(grid, tile).raster(25.0)
    x, y = grid.origins_px0[tile]
    assert plane[y // 100, x // 100] > 0
    assert np.nansum(plane > 0) == 1


@settings(max_examples=30, deadline=None)
@given(rows=st.integers(1, 97), overlap=st.sampled_from([0, 7]), mpp=st.sampled_from([0.5, 0.61, 2.0]))
def test_strips_join_to_the_plane(rows, overlap, mpp):
    grid = lattice(size_px0=(333, 277), slide_mpp=0.5, mpp=0.5, patch_size=24, overlap=overlap)
    heatmap = Heatmap(np.random.default_rng(0).random(grid.n_tiles), grid, "attention", "attention")
    np.testing.assert_array_equal(np.vstack(list(heatmap.raster_strips(mpp, rows=rows))), heatmap.raster(mpp))


def test_boxes_stay_inside_the_plane():
    grid = lattice(size_px0=(1001, 999), slide_mpp=0.25, mpp=0.25, patch_size=8)
    for mpp in (0.25, 0.4, 5.0, 200.0):
        height, width = raster_shape(grid, mpp)
        boxes, tiles = raster_boxes(grid, mpp)
        assert tiles.tolist() == list(range(grid.n_tiles))
        assert (boxes >= 0).all()
        assert (boxes[:, 2] <= width).all()
        assert (boxes[:, 3] <= height).all()
        assert (boxes[:, 2:] > boxes[:, :2]).all()


@pytest.mark.parametrize("mpp", [0.2428, 1.0, 3.9])
def test_window_is_that_part_of_the_plane(mpp):
    grid = lattice(size_px0=(2000, 1500), slide_mpp=0.2428, mpp=0.5, patch_size=33)
    heatmap = Heatmap(np.arange(grid.n_tiles) + 1.0, grid, "attention", "attention")
    x, y = 301, 203
    part = heatmap.raster(mpp, window_px0=(x, y, 703, 511))
    assert part.shape == raster_shape(grid, mpp, (x, y, 703, 511))
    assert not np.isnan(part).any()
    rows, columns = np.indices(part.shape)
    centre = np.stack([columns, rows], -1) * mpp / 0.2428 + 0.5 * mpp / 0.2428 + (x, y)
    boxes = grid.boxes_px0()[part.astype(int) - 1]
    assert ((centre > boxes[..., :2] - 1) & (centre < boxes[..., 2:] + 1)).all()


def test_tiles_outside_the_window_are_not_shown():
    grid = lattice(size_px0=(1000, 1000), slide_mpp=0.5, patch_size=100).select([0, 55])
    heatmap = Heatmap(np.array([3.0, 5.0]), grid, "attention", "attention")
    assert np.isnan(heatmap.raster(0.5, window_px0=(100, 100, 400, 400))).all()
    assert (heatmap.raster(0.5, window_px0=(450, 450, 100, 100))[50:, 50:] == 5).all()


def test_percentile_shares_ranks_and_tops_at_100():
    grid = lattice(size_px0=(80, 20), slide_mpp=0.5, patch_size=20)
    heatmap = Heatmap(np.array([0.1, 0.4, 0.1, 0.4]), grid, "attention", "attention").percentile()
    assert heatmap.values.tolist() == [37.5, 87.5, 37.5, 87.5]
    assert heatmap.kind == "attention_percentile"


def test_relative_is_one_for_an_average_tile():
    grid = lattice(size_px0=(80, 20), slide_mpp=0.5, patch_size=20)
    relative = Heatmap(np.array([0.7, 0.1, 0.1, 0.1]), grid, "attention", "attention").relative()
    np.testing.assert_allclose(relative.values, [2.8, 0.4, 0.4, 0.4])
    assert relative.values.mean() == pytest.approx(1)


@pytest.mark.parametrize(("values", "fault"), [([1.0], "1,"), ([1.0, np.nan, 0.0, 0.0], "not finite")])
def test_wrong_values_are_refused(values, fault):
    grid = lattice(size_px0=(80, 20), slide_mpp=0.5, patch_size=20)
    with pytest.raises(ValueError, match=fault):
        Heatmap(np.array(values), grid, "attention", "attention")


def test_no_tiles_give_a_blank_map():
    grid = lattice(size_px0=(80, 20), slide_mpp=0.5, patch_size=20).select(np.zeros(0, dtype=int))
    heatmap = Heatmap(np.zeros(0), grid, "attention", "attention")
    assert np.isnan(heatmap.percentile().raster(0.5)).all()
