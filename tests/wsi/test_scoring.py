"""Scores of tiles on painted slides whose blur, ink and folds are known."""

import h5py
import numpy as np
import pytest
from PIL import Image, ImageDraw
from scipy import ndimage

from eosin.errors import FeatureFileError
from eosin.wsi._coordinates import read_grid, read_quality, write_grid
from eosin.wsi._grid import Tiling
from eosin.wsi._job import JobFolder, TissueTiles, tile_slides
from eosin.wsi._quality import QualityLimits, TileQuality
from eosin.wsi._scoring import blur_of
from eosin.wsi._slide_file import SlideFile, find_slides, open_slide
from eosin.wsi._synthetic import make_slide

TILING = Tiling(patch_size=128)
BLUR = QualityLimits(blur=True)


@pytest.fixture(scope="module")
def sharp(tmp_path_factory):
    path = tmp_path_factory.mktemp("painted") / "sharp.tiff"
    make_slide(path, size_px0=(2400, 2000), mpp=0.5, seed=4)
    with open_slide(path) as slide:
        return slide.read((0, 0), slide.size_px0, 0.5)


def tiled(path, folder, limits, tiling=TILING):
    job = JobFolder(folder)
    record = tile_slides([SlideFile(path, path.stem)], job, TissueTiles(tiling, quality=limits)).records[0]
    assert record.status == "ok", record
    patches = job.patches(tiling.folder, path.stem)
    return read_grid(patches), read_quality(patches), record.message


def covered(grid, region):
    """Return which tiles lie wholly in a region (y0, y1, x0, x1)."""
    x, y = grid.origins_px0.T
    y0, y1, x0, x1 = region
    return (x >= x0) & (x + grid.tile_px0 <= x1) & (y >= y0) & (y + grid.tile_px0 <= y1)


def test_a_blurred_region_scores_high_and_sharp_tissue_does_not(sharp, write_slide, tmp_path):
    picture = sharp.copy()
    region = (500, 1400, 700, 1700)
    y0, y1, x0, x1 = region
    soft = ndimage.gaussian_filter(sharp[y0:y1, x0:x1].astype(float), (4, 4, 0))  # 2 µm
    picture[y0:y1, x0:x1] = (soft + np.random.default_rng(0).normal(0, 1.5, soft.shape)).clip(0, 255)
    path = write_slide("soft.tiff", picture, compression="jpeg")
    grid, quality, _ = tiled(path, tmp_path / "job", BLUR)
    inside, outside = covered(grid, region), ~covered(grid, (y0 - 128, y1 + 128, x0 - 128, x1 + 128))
    assert inside.sum() > 20
    assert outside.sum() > 20
    assert (quality.blur[inside] > 0.9).mean() > 0.95
    assert (quality.blur[outside] < 0.9).all()
    kept, scores, message = tiled(path, tmp_path / "limited", QualityLimits(max_blur=0.9))
    assert f"{grid.n_tiles - kept.n_tiles} tiles left out for their quality" in message
    assert kept.n_tiles == (quality.blur <= 0.9).sum()
    assert np.array_equal(scores.blur, quality.blur[quality.blur <= 0.9])


@pytest.mark.shared
@pytest.mark.parametrize(
    ("name", "mpp"),
    [("CMU-1-Small-Region.svs", None), ("tcga-cr-7395-01a-01-ts1.svs", 0.25), ("OS-2-ndpi.ome.tif", None)],
)
def test_real_tissue_is_sharp_until_it_is_blurred(shared, name, mpp):
    with open_slide(shared / "data" / "slides" / name, mpp=mpp) as slide:
        side = int(128 / slide.mpp)
        tile = slide.read((900, 900), (side, side), slide.mpp)
    soft = ndimage.gaussian_filter(tile.astype(float), (2.0 / slide.mpp, 2.0 / slide.mpp, 0)).astype(np.uint8)
    small = [np.asarray(Image.fromarray(picture).resize((128, 128), Image.Resampling.BOX)) for picture in (tile, soft)]
    before, after = blur_of(np.stack(small))
    assert before < 0.85
    assert after > 0.92


def test_blur_does_not_depend_on_contrast_and_needs_structure():
    rng = np.random.default_rng(0)
    texture = rng.normal(0, 30, (128, 128, 3))
    soft = ndimage.gaussian_filter(texture, (3, 3, 0)) * 8
    pictures = [128 + 1.0 * texture, 128 + 0.3 * texture, 128 + soft, 128 + 0.5 * soft, np.full(texture.shape, 240.0)]
    scores = blur_of(np.stack(pictures).clip(0, 255).astype(np.uint8))
    assert (scores[:2] < 0.05).all()
    assert (scores[2:4] > 0.8).all()
    assert scores[4] == 0


def test_pen_and_folds_are_scored_where_they_are(sharp, write_slide, tmp_path):
    image = Image.fromarray(sharp)
    ImageDraw.Draw(image).line([(300, 950), (2100, 1050)], fill=(30, 50, 170), width=150)
    picture = np.asarray(image).copy()
    y0, y1, x0, x1 = (1200, 1500, 600, 1700)
    light = picture[y0:y1, x0:x1] / 244.0
    picture[y0:y1, x0:x1] = 244 * light**2.5  # two and a half layers of the same tissue
    everything = Tiling(patch_size=128, min_tissue=0)
    grid, quality, _ = tiled(write_slide("marked.tiff", picture), tmp_path / "job", QualityLimits(), everything)
    boxes = grid.boxes_px0()
    stroke = (np.asarray(image) == (30, 50, 170)).all(axis=2)
    ink = np.array([stroke[t:b, le:r].mean() for le, t, r, b in boxes])
    reach = 60  # the ink's soft edge, 24 µm, counts as ink, too
    near = np.array(
        [stroke[max(0, t - reach) : b + reach, max(0, le - reach) : r + reach].any() for le, t, r, b in boxes]
    )
    assert (ink > 0.05).sum() > 5
    assert (quality.pen >= ink - 0.1).all()
    assert quality.pen[~near].max() < 0.01
    assert np.corrcoef(ink, quality.pen)[0, 1] > 0.7
    x, y = (np.array(grid.origins_px0) + 64 - np.array([1200, 1000])).T
    assert (quality.pen[np.hypot(x, y) < 64] > 0.5).all()
    share = np.array([max(0, min(b, y1) - max(t, y0)) * max(0, min(r, x1) - max(le, x0)) for le, t, r, b in boxes])
    in_fold, off_fold = (share > 0.8 * 128**2) & (quality.background < 0.2), (share == 0) & ~near
    assert in_fold.sum() >= 3
    assert quality.fold[in_fold].mean() > 0.5
    assert (quality.fold[in_fold] > 0.25).mean() > 0.6
    assert quality.fold[off_fold].mean() < 0.08  # dense follicles count, too
    assert np.median(quality.fold[off_fold]) == 0
    assert np.isnan(quality.blur).all()


def test_limits_leave_tiles_out_and_can_leave_none(sharp, write_slide, tmp_path):
    path = write_slide("sharp.tiff", sharp)
    record = tile_slides(
        find_slides([path]), JobFolder(tmp_path / "job"), TissueTiles(TILING, quality=QualityLimits(max_blur=0.01))
    ).records[0]
    assert record.status == "empty"
    assert "by blur" in record.message


def test_background_is_what_is_not_tissue(sharp, write_slide, tmp_path):
    _, quality, _ = tiled(write_slide("sharp.tiff", sharp), tmp_path / "job", QualityLimits())
    assert quality.background.max() <= 0.75 + 1e-6
    assert quality.background.min() == 0


def make_grid_file(path, n=3, quality=None):
    from eosin.wsi._grid import TileGrid

    origins = np.arange(2 * n, dtype=np.int64).reshape(n, 2)
    grid = TileGrid(origins, 128, TILING, (1000, 1000), 0.5)
    write_grid(path, grid, slide_id="a", mpp_source="user", fingerprint="", quality=quality)


def test_scores_are_stored_beside_the_coordinates(tmp_path):
    rng = np.random.default_rng(0)
    scores = TileQuality(*rng.random((4, 3)).astype(np.float32))
    path = tmp_path / "a_patches.h5"
    make_grid_file(path, quality=scores)
    found = read_quality(path)
    assert all(np.array_equal(getattr(found, name), getattr(scores, name)) for name in vars(scores))
    with h5py.File(path) as file:
        assert set(file) == {"coords", "quality"}
        assert file["quality"].attrs["columns"] == '["blur", "pen", "fold", "background"]'
        assert file["coords"].attrs["patch_size_level0"] == 128
    make_grid_file(path)
    assert read_quality(path) is None
    assert read_grid(path).n_tiles == 3


def test_scores_of_the_first_version_are_read(tmp_path, monkeypatch):
    path = tmp_path / "a_patches.h5"
    monkeypatch.setattr("eosin.wsi._coordinates.QUALITY_VERSION", "1")
    make_grid_file(path, quality=TileQuality(*np.ones((4, 3), np.float32)))
    assert read_quality(path).pen.tolist() == [1, 1, 1]


@pytest.mark.parametrize("harm", ["rows", "version", "value"])
def test_scores_that_do_not_fit_are_an_error(tmp_path, harm):
    path = tmp_path / "a_patches.h5"
    make_grid_file(path, quality=TileQuality(*np.zeros((4, 3), np.float32)))
    with h5py.File(path, "r+") as file:
        if harm == "rows":
            attributes = dict(file["quality"].attrs)
            del file["quality"]
            file["quality"] = np.zeros((2, 4), np.float32)
            file["quality"].attrs.update(attributes)
        elif harm == "version":
            file["quality"].attrs["encoding-version"] = "9"
        else:
            file["quality"][1, 2] = 0.5
    with pytest.raises(FeatureFileError):
        read_quality(path)


def test_scores_of_different_lengths_are_refused():
    with pytest.raises(ValueError, match="one length"):
        TileQuality(*(np.zeros(n, np.float32) for n in (3, 3, 3, 2)))
