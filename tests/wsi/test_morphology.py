import numpy as np
import pytest
from scipy import ndimage

from eosin.wsi._morphology import (
    close_gaps,
    drop_small,
    fill_holes,
    find_windows,
    grow,
    open_threads,
    pieces_touching,
    window_means,
    window_of,
    window_sums,
)


def dot(shape=(61, 61), at=(30, 30)):
    mask = np.zeros(shape, bool)
    mask[at] = True
    return mask


@pytest.mark.parametrize("radius", [0, 1, 1.5, 2.9, 3, 5, 8.4, 12, 14.5, 20])
def test_growing_makes_disks(radius):
    exact = ndimage.distance_transform_edt(~dot()) <= radius
    found = grow(dot(), radius)
    assert (found ^ exact).sum() <= 0.13 * exact.sum()
    if radius <= 3 or radius > 12:
        assert np.array_equal(found, exact)
    assert not grow(np.zeros((5, 5), bool), radius).any()


def test_growing_at_the_edge_does_not_wrap():
    assert grow(dot(at=(0, 0)), 2).sum() == 6
    assert not grow(dot(at=(0, 0)), 2)[-1].any()


def test_gaps_close_and_threads_open_also_at_the_edge():
    mask = np.ones((40, 40), bool)
    mask[:, 18:22] = False
    assert close_gaps(mask, 3).all()
    assert not close_gaps(mask, 1)[:, 20].any()
    thread = ~mask
    assert not open_threads(thread, 3).any()
    assert np.array_equal(open_threads(thread, 1.5), thread)
    assert np.array_equal(close_gaps(thread, 0.5), thread)


def test_small_pieces_and_holes():
    mask = np.zeros((20, 30), bool)
    mask[2:12, 2:12] = True
    mask[5:7, 5:7] = False
    mask[3, 20:23] = True
    assert drop_small(mask, 10, keep_largest=False).sum() == 96
    assert drop_small(mask, 1000, keep_largest=True).sum() == 96
    assert not drop_small(mask, 1000, keep_largest=False).any()
    assert not drop_small(np.zeros((4, 4), bool), 1, keep_largest=True).any()
    assert fill_holes(mask, 4).sum() == mask.sum() + 4
    assert np.array_equal(fill_holes(mask, 3), mask)
    assert np.array_equal(fill_holes(mask, 1000), fill_holes(mask, 4))  # the outside is not a hole
    assert fill_holes(np.ones((3, 3), bool), 1).all()


def test_pieces_with_a_seed_are_kept_whole():
    mask = np.zeros((9, 20), bool)
    mask[2:6, 2:6] = mask[2:6, 10:16] = True
    assert pieces_touching(mask, dot((9, 20), (3, 3))).sum() == 16
    assert not pieces_touching(mask, dot((9, 20), (8, 19))).any()


def test_windows_hold_what_is_true_and_a_margin():
    mask = np.zeros((50, 60), bool)
    mask[10:20, 5], mask[40, 58] = True, True
    assert window_of(mask, 3) == (slice(7, 44), slice(2, 62))
    assert sorted(find_windows(mask, 1), key=str) == [(slice(39, 42), slice(57, 60)), (slice(9, 21), slice(4, 7))]
    nothing = np.zeros((5, 5), bool)
    assert nothing[window_of(nothing, 3)].size == 0
    assert find_windows(nothing, 3) == []
    assert len(find_windows(np.random.default_rng(0).random((200, 200)) < 0.1, 0)) == 1


@pytest.mark.parametrize("side", [1, 2, 3, 5])
def test_sums_of_windows_are_those_of_the_uniform_filter(side):
    plane = np.random.default_rng(0).integers(0, 256, (13, 17), dtype=np.uint8)
    expected = ndimage.uniform_filter(plane.astype(float), side) * side**2
    assert np.allclose(window_sums(plane, side), expected)
    assert np.allclose(
        window_sums(plane // 128, side, most=1), ndimage.uniform_filter(plane // 128 * 1.0, side) * side**2
    )
    means = window_means((plane / 255).astype(np.float32), side)
    assert means.dtype == np.float32
    assert np.allclose(means, expected / side**2 / 255, atol=1e-6)
