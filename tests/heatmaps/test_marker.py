"""One marked tile lights up at its place in every format: resolutions, scanned boxes, odd downsamples, overlap."""

import base64
import io
import json
import re

import numpy as np
import pandas as pd
import pytest
import tifffile
from PIL import Image
from scenes import PixelSlide, lattice, marked_map, marked_pixels, write_slide

from eosin.heatmaps.export._png import COLOUR_BAR_PX, MARGIN_PX, TITLE_PX, take_view
from eosin.heatmaps.export._tiff import default_mpp
from eosin.mil._checkpoint import ModelCard
from eosin.mil._recipe import Component, Recipe
from eosin.mil.task import make_task
from eosin.pipeline._explain import FORMATS, Explanation, _write
from eosin.wsi._slide_file import open_slide

LIT = (213, 198, 62)  # the last yellow of the scale over the pale grey of the mark
SIZE = (903, 707)


@pytest.fixture(scope="module")
def card(request):
    from scenes import feature_bag

    grid = lattice(size_px0=(64, 64), slide_mpp=0.5)
    spec = feature_bag(np.zeros((1, 4), np.float32), grid).spec
    task = make_task("classification", [{"label": "normal"}, {"label": "tumour"}])
    return ModelCard(
        recipe=Recipe(aggregator=Component(name="abmil")), task=task.model_dump(mode="json"), features=spec
    )


def make_slide(tmp_path, grid, tile, kind):
    """A file with odd downsamples, or a slide whose scanned box starts elsewhere than its pixels."""
    pixels = marked_pixels(grid, tile)
    if kind == "scanned box":
        return PixelSlide(pixels, grid.slide_mpp, bounds_px0=(37, 23, SIZE[0] - 90, SIZE[1] - 70))
    write_slide(tmp_path / "s.tiff", pixels, mpp=grid.slide_mpp, downsamples=kind)
    return open_slide(tmp_path / "s.tiff")


def lit_place(image):
    """Return the middle (x, y) of the pixels that have the brightest colour of the map."""
    distance = np.abs(image.astype(int) - LIT).sum(-1)
    rows, columns = np.nonzero(distance < 60)
    assert len(rows), "nothing is lit"
    return columns.mean() + 0.5, rows.mean() + 0.5


def place_in(path, slide):
    """Return where a file says the marked tile is, (x, y) in level-0 pixels: its middle."""
    corner = np.array((0, 0) if slide.bounds_px0 is None else slide.bounds_px0[:2])
    if path.suffix in (".csv", ".parquet"):
        table = pd.read_csv(path) if path.suffix == ".csv" else pd.read_parquet(path)
        row = table.loc[table.attention.idxmax()]
        return np.array([row.x_px0, row.y_px0]) + row.size_px0 / 2
    if path.suffix == ".geojson":
        features = json.loads(path.read_text())["features"]
        lit = max(features, key=lambda feature: feature["properties"]["measurements"]["attention"])
        assert lit["properties"]["classification"]["color"] == [223, 227, 24]  # of the uppermost of ten classes
        return np.array(lit["geometry"]["coordinates"][0][:4]).mean(0) + corner
    if path.name.endswith("scores.tiff"):
        scores = tifffile.imread(path)
        rows, columns = np.nonzero(scores == np.nanmax(scores))
        return np.array([columns.mean() + 0.5, rows.mean() + 0.5]) * map_mpp(path) / slide.mpp + corner
    if path.suffix == ".tiff":
        rows, columns = np.nonzero((tifffile.imread(path) == (253, 231, 37)).all(-1))
        return np.array([columns.mean() + 0.5, rows.mean() + 0.5]) * map_mpp(path) / slide.mpp + corner
    return drawn_place(path, slide) + corner


def map_mpp(path):
    with tifffile.TiffFile(path) as tiff:
        numerator, denominator = tiff.pages[0].tags["XResolution"].value
    return 1e4 * denominator / numerator


def drawn_place(path, slide):
    if path.suffix == ".png":
        view = take_view(slide)
        with Image.open(path) as picture:
            image = np.asarray(picture.convert("RGB"))
        height, width = view.image.shape[:2]
        left, top = image.shape[1] - COLOUR_BAR_PX - width, MARGIN_PX + TITLE_PX
        overlay = image[top : top + height, left : left + width]
    else:
        pictures = re.findall(r"data:image/jpeg;base64,([A-Za-z0-9+/=]+)", path.read_text(encoding="utf-8"))
        view = take_view(slide, longest_px=720)
        overlay = np.asarray(Image.open(io.BytesIO(base64.b64decode(pictures[1]))))
    return np.array(lit_place(overlay)) / view.px_per_px0


@pytest.mark.parametrize("mpp", [0.25, 0.5, 1.0])
@pytest.mark.parametrize("kind", [(3,), (5, 7), "scanned box"])
def test_marked_tile_lights_up_in_every_format(tmp_path, card, mpp, kind):
    grid = lattice(size_px0=SIZE, slide_mpp=0.25, mpp=mpp, patch_size=round(24 * 0.5 / mpp) + 3)
    tile = grid.n_tiles // 2 + 2
    heatmap = marked_map(grid, tile)
    with make_slide(tmp_path, grid, tile, kind) as slide:
        explanation = Explanation("s", slide, None, [heatmap.percentile(), heatmap], card, {"predicted": "tumour"})
        expected = grid.boxes_px0()[tile].reshape(2, 2).mean(0)
        for name in FORMATS:
            path = _write(name, explanation, tmp_path / f"s_alone.{name}")
            found = place_in(path, slide)
            assert np.abs(found - expected).max() <= 0.2 * grid.tile_px0, name


@pytest.mark.parametrize("overlap", [16, 24])
def test_overlapping_tiles_give_a_finer_map(overlap):
    """Four tiles around a point differ where they overlap: the map's step is the tiles' step, not their side."""
    grid = lattice(size_px0=(320, 320), slide_mpp=0.5, mpp=0.5, patch_size=32, overlap=overlap)
    step = 32 - overlap
    heatmap = marked_map(grid, grid.n_tiles // 2)
    plane = heatmap.raster(0.5)
    cells = plane[: 320 // step * step, : 320 // step * step].reshape(320 // step, step, -1, step)
    assert np.ptp(cells, axis=(1, 3)).max() < 1e-6  # constant within a step
    assert len(np.unique(plane[plane > 0])) == 1
    assert (plane > 0).sum() == 32 * 32
    assert default_mpp(heatmap) <= step * 0.5 / 16 * 1.01 or default_mpp(heatmap) == 0.5
    moved = marked_map(grid, grid.n_tiles // 2 + 1).raster(0.5)
    assert np.abs(plane - moved).max() > 0
    both = grid.origins_px0[grid.n_tiles // 2 + 1] - grid.origins_px0[grid.n_tiles // 2]
    assert np.abs(both).max() == step
