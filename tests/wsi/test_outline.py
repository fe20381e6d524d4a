import numpy as np
import pytest
from shapely import MultiPolygon

from eosin.wsi._outline import fill_outline, trace_outline


@pytest.fixture(scope="module")
def ring_and_blob():
    rows, columns = np.indices((120, 200))
    ring = np.hypot(columns - 50, rows - 60)
    return ((ring < 45) & (ring > 15)) | (np.hypot(columns - 150, rows - 60) < 30)


def test_pieces_holes_and_area(ring_and_blob):
    outline = trace_outline(ring_and_blob, (32.0, 32.0), (6400, 3840))
    assert sorted(len(piece.interiors) for piece in outline.geoms) == [0, 1]
    assert outline.is_valid
    assert outline.area == pytest.approx(ring_and_blob.sum() * 32**2, rel=0.02)


def test_the_way_back_gives_the_mask(ring_and_blob):
    outline = trace_outline(ring_and_blob, (32.0, 32.0), (6400, 3840))
    back = fill_outline(outline, (32.0, 32.0), ring_and_blob.shape)
    assert (back ^ ring_and_blob).sum() < 0.02 * ring_and_blob.sum()


def test_a_full_mask_is_the_slide():
    outline = trace_outline(np.ones((10, 20), bool), (10.0, 10.0), (195, 93))
    assert outline.bounds == (0, 0, 195, 93)
    assert outline.area == pytest.approx(195 * 93, rel=0.01)


def test_nothing_and_single_cells():
    assert trace_outline(np.zeros((5, 5), bool), (1.0, 1.0), (5, 5)).is_empty
    one = np.zeros((5, 5), bool)
    one[2, 3] = True
    outline = trace_outline(one, (10.0, 10.0), (50, 50))
    assert outline.centroid.coords[0] == pytest.approx((35, 25))
    assert not fill_outline(MultiPolygon(), (1.0, 1.0), (4, 6)).any()


def test_cells_that_touch_at_a_corner_are_two_pieces():
    mask = np.zeros((6, 6), bool)
    mask[1:3, 1:3] = mask[3:5, 3:5] = True
    outline = trace_outline(mask, (10.0, 10.0), (60, 60))
    assert outline.is_valid
    assert len(outline.geoms) == 2
