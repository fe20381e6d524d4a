import time
from pathlib import Path

import numpy as np
import pytest
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from sklearn.metrics import roc_auc_score

from eosin.features._he_texture import FEATURE_NAMES, GLASS_LEVEL, MIN_TILE_PX, STAIN_VECTORS, describe
from eosin.wsi._synthetic import make_slide

TILE_PX = 128


def paint(haematoxylin: np.ndarray, eosin: np.ndarray) -> np.ndarray:
    density = haematoxylin[..., None] * np.array(STAIN_VECTORS[0]) + eosin[..., None] * np.array(STAIN_VECTORS[1])
    return (GLASS_LEVEL * 10**-density).round().astype(np.uint8)[None]


def feature(rows: np.ndarray, name: str) -> np.ndarray:
    return rows[:, FEATURE_NAMES.index(name)]


def discs(radius: float, spacing: int, amount: float = 0.8) -> np.ndarray:
    y, x = np.mgrid[:TILE_PX, :TILE_PX] % spacing - spacing // 2
    away = np.hypot(x, y) / radius
    return amount * (1 - 0.3 * away**2) * (away < 1)


@pytest.fixture(scope="module")
def tissue(tmp_path_factory: pytest.TempPathFactory) -> tuple[np.ndarray, np.ndarray]:
    """Tiles of a synthetic slide, and the part of each that is tumour."""
    path = tmp_path_factory.mktemp("slide") / "s.tiff"
    mask = make_slide(path, size_px0=(1536, 1536), tumour_fraction=0.15, seed=1)
    pixels = tifffile.imread(path, key=0)
    rows = pixels.reshape(12, TILE_PX, 12, TILE_PX, 3).swapaxes(1, 2).reshape(-1, TILE_PX, TILE_PX, 3)
    share = mask.reshape(12, 32, 12, 32).mean(axis=(1, 3)).ravel()
    keep = (rows.min(axis=3) < 200).mean(axis=(1, 2)) > 0.3
    return np.ascontiguousarray(rows[keep]), share[keep]


def test_one_column_per_unique_name(tissue: tuple[np.ndarray, np.ndarray]) -> None:
    rows = describe(tissue[0][:3])
    assert rows.shape == (3, len(FEATURE_NAMES)) == (3, 97)
    assert rows.dtype == np.float32
    assert len(set(FEATURE_NAMES)) == len(FEATURE_NAMES)


def test_row_depends_on_its_tile_alone(tissue: tuple[np.ndarray, np.ndarray]) -> None:
    tiles = tissue[0]
    np.testing.assert_allclose(describe(tiles)[7], describe(tiles[7:8])[0], atol=1e-4)


def test_features_of_tissue_are_of_order_one(tissue: tuple[np.ndarray, np.ndarray]) -> None:
    rows = describe(tissue[0])
    assert np.abs(np.median(rows, axis=0)).max() < 2.5
    assert rows.std(axis=0).max() < 3.5
    assert rows.std(axis=0).min() > 0.1


def test_tumour_tiles_are_told_by_the_size_of_their_nuclei(tissue: tuple[np.ndarray, np.ndarray]) -> None:
    tiles, share = tissue
    assert roc_auc_score(share > 0.3, feature(describe(tiles), "nuclei_left_3")) > 0.93


def test_stains_are_separated() -> None:
    plane = np.full((TILE_PX, TILE_PX), 0.5)
    empty = np.zeros_like(plane)
    blue, pink = describe(paint(plane, empty)), describe(paint(empty, plane))
    for rows, mine, other in ((blue, "h", "e"), (pink, "e", "h")):
        assert feature(rows, f"{mine}_mean") > feature(describe(paint(empty, empty)), f"{mine}_mean") + 1
        assert feature(rows, f"{other}_mean") == pytest.approx(
            feature(describe(paint(empty, empty)), f"{other}_mean"), abs=0.1
        )


def test_erosion_tells_large_nuclei_from_small_ones_of_the_same_area() -> None:
    small, large = discs(6, 16), discs(12, 32)
    assert (small > 0).mean() == pytest.approx((large > 0).mean(), rel=0.05)
    rows = describe(np.concatenate([paint(h, np.full_like(h, 0.3)) for h in (small, large)]))
    area, left, count = (feature(rows, name) for name in ("nuclei_area", "nuclei_left_3", "nuclei_count_1"))
    assert area[0] == pytest.approx(area[1], abs=0.4)
    assert left[1] > left[0] + 1
    assert count[0] > count[1]


def test_direction_tells_fibres_from_noise() -> None:
    rng = np.random.default_rng(0)
    fibres = np.repeat(rng.uniform(0.1, 0.6, (1, TILE_PX)), TILE_PX, axis=0)
    noise = rng.uniform(0.1, 0.6, (TILE_PX, TILE_PX))
    rows = describe(np.concatenate([paint(np.zeros_like(e), e) for e in (fibres, fibres.T, noise)]))
    across, along, none = feature(rows, "e_directed")
    assert across == pytest.approx(along, abs=0.05)
    assert across > none + 2


@pytest.mark.parametrize("turn", [1, 2, 3])
def test_turning_a_tile_changes_little(tissue: tuple[np.ndarray, np.ndarray], turn: int) -> None:
    tiles = tissue[0][::5]
    turned = np.ascontiguousarray(np.rot90(tiles, turn, axes=(1, 2)))
    assert np.abs(describe(tiles) - describe(turned)).mean() < 0.03


def test_ratios_move_less_than_amounts_when_the_stain_is_stronger() -> None:
    rng = np.random.default_rng(1)
    h, e = discs(8, 24, amount=0.6), np.full((TILE_PX, TILE_PX), 0.3) + rng.normal(0, 0.03, (TILE_PX, TILE_PX))
    weak, strong = describe(paint(h, e)), describe(paint(1.3 * h, 1.3 * e))
    change = np.abs(strong - weak)
    for name in ("blueness", "nuclei_left_3", "h_band_2", "h_directed", "h_lbp1_9"):
        assert feature(change, name) < 0.25
    assert feature(change, "e_q50") > 0.5


@given(
    tiles=arrays(np.uint8, st.tuples(st.just(1), st.integers(32, 70), st.integers(32, 70), st.just(3)), fill=st.just(9))
)
@settings(max_examples=25, deadline=None)
def test_any_pixels_give_finite_bounded_features(tiles: np.ndarray) -> None:
    rows = describe(tiles)
    assert np.isfinite(rows).all()
    assert np.abs(rows).max() <= 8


@pytest.mark.parametrize("level", [0, 1, 128, 255])
def test_flat_tiles_are_finite(level: int) -> None:
    assert np.isfinite(describe(np.full((2, 64, 64, 3), level, np.uint8))).all()


def test_no_tiles_give_no_rows() -> None:
    assert describe(np.zeros((0, 64, 64, 3), np.uint8)).shape == (0, len(FEATURE_NAMES))


@pytest.mark.parametrize(
    "tiles",
    [
        np.zeros((64, 64, 3), np.uint8),
        np.zeros((1, 64, 64, 4), np.uint8),
        np.zeros((1, 64, 64, 3), np.float32),
        np.zeros((1, MIN_TILE_PX - 1, 64, 3), np.uint8),
    ],
)
def test_what_is_no_batch_of_tiles_is_refused(tiles: np.ndarray) -> None:
    with pytest.raises(ValueError, match="expected tiles as"):
        describe(tiles)


def test_odd_sides_ignore_the_rest() -> None:
    tiles = np.random.default_rng(2).integers(0, 256, (1, 79, 90, 3), dtype=np.uint8)
    np.testing.assert_array_equal(describe(tiles), describe(np.ascontiguousarray(tiles[:, :64, :80])))


@pytest.mark.shared
def test_real_slides_give_features_of_order_one(shared: Path) -> None:
    openslide = pytest.importorskip("openslide")
    with openslide.OpenSlide(shared / "data/slides/CMU-1-Small-Region.svs") as slide:
        region = np.asarray(slide.read_region((500, 1500), 0, (1024, 1024)).convert("RGB"))
    rows = describe(np.ascontiguousarray(region.reshape(4, 256, 4, 256, 3).swapaxes(1, 2).reshape(16, 256, 256, 3)))
    assert np.abs(np.median(rows, axis=0)).max() < 4


@pytest.mark.slow
def test_three_hundred_tiles_per_second(tissue: tuple[np.ndarray, np.ndarray]) -> None:
    tiles = np.random.default_rng(0).integers(0, 256, (64, 256, 256, 3), dtype=np.uint8)
    describe(tiles[:4])
    started = time.process_time()
    describe(tiles)
    assert len(tiles) / (time.process_time() - started) > 300
