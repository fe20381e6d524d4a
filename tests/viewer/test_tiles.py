import io
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from eosin.errors import CorruptSlideError
from eosin.viewer._tiles import TILE_PX, OpenSlides, TilePyramid, TileStore, blank_png, to_grey
from eosin.wsi._slide_file import SlideFile, open_slide


def pixels(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"), dtype=int)


@given(st.integers(1, 10**6), st.integers(1, 10**6))
def test_the_pyramid_just_holds_the_slide(width, height):
    pyramid = TilePyramid((width, height), 0.25)
    side = TILE_PX << pyramid.max_zoom
    assert side >= max(width, height)
    assert pyramid.max_zoom == 0 or side // 2 < max(width, height)
    assert pyramid.side_um == side * 0.25


def test_tiles_of_every_zoom_are_the_pixels_that_the_slide_gives(scene, catalogue):
    key = catalogue.shown[0].key
    store = TileStore(catalogue.slides)
    with open_slide(scene[1].path) as slide:
        pyramid = TilePyramid(slide.size_px0, slide.mpp)
        assert pyramid.max_zoom == 1
        for zoom, column, row in ((0, 0, 0), (1, 0, 0), (1, 1, 0)):
            shrink = 2 ** (1 - zoom)
            corner = column * TILE_PX * shrink, row * TILE_PX * shrink
            truth = slide.read(corner, (TILE_PX, TILE_PX), slide.mpp * shrink).astype(int)
            assert np.abs(pixels(store.tile(key, "colour", zoom, column, row)) - truth).mean() < 3
            grey = pixels(store.tile(key, "grey", zoom, column, row))
            assert np.abs(grey - to_grey(truth.astype(np.uint8))).mean() < 3
            assert np.ptp(grey, axis=2).max() <= 6


def test_places_beside_the_slide_are_transparent_and_others_do_not_exist(catalogue):
    key = catalogue.shown[0].key
    store = TileStore(catalogue.slides)
    assert store.tile(key, "colour", 1, 1, 1) == blank_png()  # in the square, below the slide
    assert store.tile(key, "colour", 2, 3, 3) == blank_png()  # read ahead by the browser
    for place in ((3, 0, 0), (1, 2, 0), (1, 0, 2), (0, 1, 0), (99, 0, 0), (1, -1, 0), (2, 4, 0)):
        with pytest.raises(LookupError):
            store.tile(key, "colour", *place)
    for wrong in (("0" * 16, "colour"), (key, "label"), (str(catalogue.shown[0].file.path), "colour")):
        with pytest.raises(LookupError):
            store.tile(*wrong, 0, 0, 0)


def test_a_tile_is_made_once_also_when_many_ask(catalogue, monkeypatch):
    store, made = TileStore(catalogue.slides), []
    real = TilePyramid.read
    monkeypatch.setattr(TilePyramid, "read", lambda *arguments: made.append(1) or real(*arguments))
    with ThreadPoolExecutor(8) as pool:
        tiles = set(pool.map(lambda _: store.tile(catalogue.shown[0].key, "colour", 1, 0, 0), range(32)))
    assert len(tiles) == len(made) == 1


def test_pixels_that_cannot_be_decoded_are_grey_and_no_error(catalogue, monkeypatch, caplog):
    def broken(*_):
        raise CorruptSlideError("slide", "level 0 is damaged")

    monkeypatch.setattr(TilePyramid, "read", broken)
    tile = pixels(TileStore(catalogue.slides).tile(catalogue.shown[0].key, "colour", 0, 0, 0))
    assert np.abs(tile - 214).max() <= 2
    assert "level 0 is damaged" in caplog.text


def test_a_cutout_is_the_tile_alone(scene, catalogue):
    grid = scene[2].grid
    box = tuple(grid.boxes_px0()[89].tolist())
    picture = pixels(TileStore(catalogue.slides).cutout(catalogue.shown[0].key, box, 64))
    assert picture.shape == (64, 64, 3)
    assert np.abs(picture[8:-8, 8:-8] - (60, 20, 90)).max() < 12


def test_slides_in_use_stay_open_and_surplus_ones_are_closed(scene, folder):
    paths = {"a": scene[1].path, "b": folder / "slide-2.tiff"}
    slides = OpenSlides({key: SlideFile(path, key) for key, path in paths.items()}, max_open=1)
    closed = []
    with slides.borrow("a") as first:
        real = first.close
        first.close = lambda: closed.append("a") or real()
        with slides.borrow("b"):
            assert not closed
            assert first.read((0, 0), (8, 8), 0.5).shape == (8, 8, 3)
    assert closed == ["a"]
    slides.close()
