import threading

import numpy as np
import pytest

from eosin.errors import CorruptSlideError
from eosin.wsi._grid import Tiling, make_grid
from eosin.wsi._slide_file import open_slide
from eosin.wsi._tiles import iterate_tiles
from eosin.wsi._tissue import find_tissue


@pytest.fixture
def slide(write_slide, tissue_picture):
    with open_slide(write_slide("a.tiff", tissue_picture, levels=(2, 4))) as slide:
        yield slide


@pytest.fixture
def grid(slide):
    tiling = Tiling(patch_size=64, overlap=10)
    return make_grid(find_tissue(slide), tiling, slide_size_px0=slide.size_px0, slide_mpp=slide.mpp)


@pytest.mark.parametrize("threads", [0, 1, 3])
def test_every_tile_comes_once_in_the_order_of_the_grid(slide, grid, tissue_picture, threads):
    assert grid.n_tiles > 100
    batches = list(iterate_tiles(slide, grid, batch_size=32, threads=threads))
    assert np.concatenate([index for _, index in batches]).tolist() == list(range(grid.n_tiles))
    assert {len(index) for _, index in batches[:-1]} == {32}
    for tiles, index in batches:
        assert tiles.shape == (len(index), 64, 64, 3)
        for tile, (x, y) in zip(tiles, grid.origins_px0[index].tolist(), strict=True):
            assert np.array_equal(tile, tissue_picture[y : y + 64, x : x + 64])


def test_an_empty_grid_has_no_batches(slide, grid):
    assert list(iterate_tiles(slide, grid.select([]), batch_size=8)) == []


class Counting:
    """A slide that counts how far ahead of the consumer it is read."""

    mpp = 0.5

    def __init__(self):
        self.reads = 0
        self.lock = threading.Lock()

    def read(self, origin_px0, size_px, mpp):
        with self.lock:
            self.reads += 1
        if self.reads > 1000:
            raise CorruptSlideError("a.svs", "made up")
        return np.zeros((size_px[1], size_px[0], 3), np.uint8)


def test_few_batches_are_read_ahead_and_none_after_the_consumer_left(grid):
    slide = Counting()
    batches = iterate_tiles(slide, grid, batch_size=4, threads=2)
    next(batches)
    next(batches)
    assert slide.reads <= 4 * (2 + 4)
    batches.close()
    read = slide.reads
    assert read < grid.n_tiles
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("tiles")]


def test_a_damaged_slide_raises_in_the_consumer(grid):
    slide = Counting()
    slide.reads = 1000 - 4
    with pytest.raises(CorruptSlideError, match="made up"):
        list(iterate_tiles(slide, grid, batch_size=2, threads=2))
