import numpy as np
import pytest
import shapely
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scenes import lattice as make_grid

from eosin.heatmaps._heatmap import Heatmap
from eosin.viewer._lattice import area_in_outline, area_under_stroke, centres_px0, make_lattice, tiles_within

GRID = make_grid(size_px0=(640, 480), slide_mpp=0.5, patch_size=40)


def values_of(grid):
    return np.random.default_rng(0).normal(size=grid.n_tiles)


@pytest.mark.parametrize("slide_mpp", [0.25, 0.5, 0.37, 0.2528])
@pytest.mark.parametrize("overlap", [0, 20])
def test_the_picture_is_the_raster_of_the_map_cut_to_its_tiles(slide_mpp, overlap):
    grid = make_grid(size_px0=(1500, 1100), slide_mpp=slide_mpp, patch_size=40, overlap=overlap).select(
        np.arange(20, 90)
    )
    lattice, values = make_lattice(grid), values_of(grid)
    whole = Heatmap(values, grid, "attention", "attention").raster(lattice.cell_um)
    column, row = (round(side / lattice.cell_um) for side in lattice.origin_um)
    height, width = lattice.shape
    np.testing.assert_allclose(lattice.paint(values), whole[row : row + height, column : column + width], rtol=1e-6)
    assert np.isfinite(whole).sum() == np.isfinite(lattice.paint(values)).sum()


def test_a_tile_without_overlap_is_one_cell():
    lattice = make_lattice(GRID)
    assert lattice.shape == (12, 16)
    assert lattice.cell_um == 20.0
    np.testing.assert_array_equal(lattice.paint(np.arange(192.0)), np.arange(192.0).reshape(12, 16))


def test_padded_tiles_are_whole_cells_that_reach_the_edge():
    grid = make_grid(size_px0=(403, 301), slide_mpp=0.5, patch_size=64, edges="pad")
    lattice = make_lattice(grid)
    assert lattice.shape == (5, 7)
    np.testing.assert_array_equal(lattice.paint(np.arange(35.0)), np.arange(35.0).reshape(5, 7))


def test_tiles_off_any_lattice_are_told_apart():
    grid = make_grid(size_px0=(640, 480), slide_mpp=0.5, patch_size=40).select([0, 50, 100])
    grid.origins_px0[1] += 13
    lattice = make_lattice(grid)
    picture = lattice.paint(np.array([1.0, 2.0, 3.0]))
    assert [np.count_nonzero(picture == value) for value in (1, 2, 3)] == [16, 16, 16]


@given(arrays(np.bool_, 192))
def test_covered_cells_and_their_border(chosen):
    lattice = make_lattice(GRID)
    plane = lattice.cover(chosen)
    np.testing.assert_array_equal(plane.ravel(), chosen)
    edges = lattice.edges_um(plane)
    cells = shapely.union_all([shapely.box(x, y, x + 20, y + 20) for y, x in np.argwhere(plane) * 20.0])
    assert len(edges) * 20 == pytest.approx(cells.length)


@given(st.lists(st.tuples(st.floats(-50, 700), st.floats(-50, 500)), min_size=0, max_size=8))
def test_a_lasso_takes_the_tiles_whose_centre_it_surrounds(points):
    outline = np.array(points, dtype=float).reshape(-1, 2).round(3)
    found = tiles_within(GRID, area_in_outline(GRID, outline))
    if len(points) < 3:
        assert not len(found)
        return
    area = shapely.make_valid(shapely.simplify(shapely.Polygon(outline), 2))
    inside = [area.contains(shapely.Point(centre)) for centre in centres_px0(GRID)]
    np.testing.assert_array_equal(found, np.flatnonzero(inside))


def test_a_brush_takes_what_it_passes_over_and_is_as_wide_as_asked():
    stroke = np.array([(0, 100), (640, 100)], dtype=float)
    assert set(tiles_within(GRID, area_under_stroke(GRID, stroke, width_tiles=1))) == set(range(32, 48))
    assert set(tiles_within(GRID, area_under_stroke(GRID, stroke, width_tiles=3))) == set(range(16, 64))
    assert tiles_within(GRID, area_under_stroke(GRID, np.array([(20.0, 20.0)]), width_tiles=1)).tolist() == [0]


def test_points_that_are_no_numbers_take_nothing():
    bad = np.array([(0, 0), (np.nan, 1), (2, np.inf)])
    assert not len(tiles_within(GRID, area_in_outline(GRID, bad)))
    assert not len(tiles_within(GRID, area_under_stroke(GRID, bad, width_tiles=2)))
    assert not len(tiles_within(GRID, area_under_stroke(GRID, np.zeros((0, 2)), width_tiles=2)))
