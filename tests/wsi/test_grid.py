import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eosin.errors import ConfigError, SlideError
from eosin.wsi._grid import TileGrid, Tiling, make_grid
from eosin.wsi._tissue import TissueMask


def all_tissue(width: int, height: int, mpp: float = 0.5) -> TissueMask:
    return TissueMask(np.ones((10, 10), bool), (width / 10, height / 10), (width, height), mpp)


def grid_of(width: int, height: int, mpp: float, tiling: Tiling) -> TileGrid:
    return make_grid(all_tissue(width, height, mpp), tiling, slide_size_px0=(width, height), slide_mpp=mpp)


@settings(max_examples=60, deadline=None)
@given(
    width=st.integers(1, 120_000),
    mpp=st.floats(0.1, 0.5),
    target=st.floats(0.5, 8.0),
    patch=st.integers(200, 600),
    share=st.floats(0, 0.9),
)
def test_positions_are_exact_over_rounding_and_nothing_sticks_out(width, mpp, target, patch, share):
    tiling = Tiling(mpp=target, patch_size=patch, overlap=int(share * patch), min_tissue=0)
    scale = tiling.delivered_mpp(mpp) / mpp
    height = int(patch * scale * 1.5) + 1
    xs = np.unique(grid_of(width, height, mpp, tiling).origins_px0[:, 0])
    exact = np.arange(len(xs)) * (patch - tiling.overlap) * scale
    assert np.abs(xs - exact).max(initial=0) <= 0.5 + 1e-6  # no drift: each position is rounded once
    side = round(patch * scale)
    assert xs.max(initial=0) + side <= max(width, side)
    following = round(len(xs) * (patch - tiling.overlap) * scale)
    assert following + side > width - 1  # and none that fits is missing


def test_order_is_row_major_from_the_corner():
    grid = grid_of(700, 520, 0.5, Tiling(patch_size=256))
    assert grid.origins_px0.tolist() == [[0, 0], [256, 0], [0, 256], [256, 256]]
    assert grid.boxes_px0()[-1].tolist() == [256, 256, 512, 512]


def test_overlap_makes_steps_smaller():
    grid = grid_of(600, 256, 0.5, Tiling(patch_size=256, overlap=64))
    assert grid.origins_px0[:, 0].tolist() == [0, 192]


@pytest.mark.parametrize("overlap", [256, 300])
def test_overlap_as_large_as_a_tile_is_refused(overlap):
    with pytest.raises(ConfigError, match="overlap"):
        Tiling.parse({"overlap": overlap})
    with pytest.raises(ConfigError, match="overlap"):
        Tiling(overlap=overlap)


def test_the_own_mpp_of_a_slide_is_delivered_within_the_tolerance():
    near, far = grid_of(2000, 2000, 0.499, Tiling()), grid_of(2000, 2000, 0.48, Tiling())
    assert (near.tile_px0, near.delivered_mpp) == (256, 0.499)
    assert (far.tile_px0, far.delivered_mpp) == (267, 0.5)


@pytest.mark.parametrize(
    ("own", "delivered", "tile_px0"), [(0.252, 0.504, 512), (0.1255, 0.502, 1024), (0.24, 0.5, 533)]
)
def test_powers_of_two_of_the_own_mpp_are_delivered_as_plain_averages(own, delivered, tile_px0):
    grid = grid_of(4000, 4000, own, Tiling())
    assert grid.delivered_mpp == pytest.approx(delivered)
    assert grid.tile_px0 == tile_px0


def test_true_mpp_decides_the_size_on_the_slide():
    assert grid_of(3000, 3000, 0.23, Tiling(mpp=0.5)).tile_px0 == round(256 * 0.5 / 0.23)


@pytest.mark.parametrize(("mpp", "refused"), [(0.5, False), (0.549, False), (0.56, True), (20.0, True)])
def test_upsampling_beyond_the_limit_is_refused(mpp, refused):
    if not refused:
        assert grid_of(2000, 2000, mpp, Tiling()).n_tiles > 0
        return
    with pytest.raises(SlideError, match=r"0\.5 µm/px was requested") as caught:
        grid_of(2000, 2000, mpp, Tiling())
    assert caught.value.code == "too-coarse"


def test_only_tiles_with_enough_tissue_are_kept():
    mask = np.zeros((4, 4), bool)
    mask[:2, :1] = True  # left quarter of the first of two columns of tiles
    tissue = TissueMask(mask, (128, 128), (512, 512), 0.5)
    for least, expected in [(0.5, [[0, 0]]), (0.51, []), (0.0, [[0, 0]])]:
        grid = make_grid(tissue, Tiling(min_tissue=least), slide_size_px0=(512, 512), slide_mpp=0.5)
        assert grid.origins_px0.tolist() == expected


@pytest.mark.parametrize("overlap", [0, 64])
@pytest.mark.parametrize("width", [200, 256, 257, 700, 768])
def test_padded_tiles_reach_the_edge_and_none_lies_beyond(width, overlap):
    whole = grid_of(width, 300, 0.5, Tiling(overlap=overlap))
    grid = grid_of(width, 300, 0.5, Tiling(overlap=overlap, edges="pad", min_tissue=0.0))
    xs = np.unique(grid.origins_px0[:, 0])
    assert xs[-1] < width <= xs[-1] + 256
    assert set(whole.origins_px0[:, 0].tolist()) <= set(xs.tolist())
    assert len(xs) == 1 or xs[-2] + 256 < width  # one more than fits, and only where it is needed


@pytest.mark.parametrize("overlap", [0, 30, 64, 100])
def test_points_are_in_a_tile_when_they_are_in_its_box(overlap):
    rng = np.random.default_rng(overlap)
    grid = grid_of(1500, 1300, 0.3, Tiling(patch_size=128, overlap=overlap, mpp=0.5))
    some = grid.select(rng.permutation(grid.n_tiles)[: grid.n_tiles // 3])
    points = rng.uniform(0, (1500, 1300), (3000, 2)).round() + 0.5
    x0, y0, x1, y1 = some.boxes_px0().T
    x, y = points[:, :1], points[:, 1:]
    expected = ((x >= x0) & (x < x1) & (y >= y0) & (y < y1)).any(axis=1)
    assert 0.1 < expected.mean() < 0.99
    assert (some.covers(points) == expected).mean() > 0.995  # a corner is rounded once, a point is not
    assert not grid.select([]).covers(points).any()
    assert grid.reach_px0() == tuple(grid.boxes_px0()[:, 2:].max(axis=0).tolist())


def test_a_slide_smaller_than_a_tile_has_none():
    grid = grid_of(200, 4000, 0.5, Tiling())
    assert grid.n_tiles == 0
    assert grid.origins_px0.shape == (0, 2)


def test_an_absurd_number_of_tiles_is_refused():
    with pytest.raises(ConfigError, match="tiles on this slide"):
        grid_of(100_000, 100_000, 0.5, Tiling(patch_size=8))


def test_select_takes_indices_and_masks():
    grid = grid_of(700, 520, 0.5, Tiling())
    assert grid.select([3, 0]).origins_px0.tolist() == [[256, 256], [0, 0]]
    assert grid.select(np.array([True, False, False, False])).n_tiles == 1


def test_folder_name():
    assert Tiling(mpp=0.5).folder == "0.5mpp_256px_0px_overlap"
    assert Tiling(mpp=1.0, patch_size=224, overlap=32).folder == "1mpp_224px_32px_overlap"


def test_origins_of_another_kind_are_refused():
    with pytest.raises(ValueError, match="origins_px0"):
        TileGrid(np.zeros((3, 2), np.int32), 256, Tiling(), (10, 10), 0.5)
