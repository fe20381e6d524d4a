"""Tiles of a slide in batches for encoders."""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

from eosin.wsi._colour import in_srgb
from eosin.wsi._grid import TileGrid
from eosin.wsi._slide import Slide

TileBatch = tuple[NDArray[np.uint8], NDArray[np.int64]]
AHEAD = 2


def iterate_tiles(slide: Slide, grid: TileGrid, *, batch_size: int, threads: int = 2) -> Iterator[TileBatch]:
    """Read the tiles of a grid, some batches ahead of the consumer.

    Parameters
    ----------
    slide : Slide
        Open; read from several threads. Colours are converted when the grid's tiling says so.
    grid : TileGrid
        Its tiles, in its order.
    batch_size : int
        Tiles per batch; the last may be shorter.
    threads : int
        Threads that read, each a part of every batch; 0 reads in the caller's.

    Yields
    ------
    tiles : (b, h, w, 3) uint8
    index : (b,) int64
        Rows of the grid. At most ``threads + 2`` batches are held at a time.

    Raises
    ------
    CorruptSlideError
        If stored pixels cannot be decoded.
    """
    if grid.tiling.icc:
        slide = in_srgb(slide)
    batches = [np.arange(start, min(start + batch_size, grid.n_tiles)) for start in range(0, grid.n_tiles, batch_size)]
    if threads == 0:
        yield from ((_read(slide, grid, index), index) for index in batches)
        return
    with ThreadPoolExecutor(threads, thread_name_prefix="tiles") as pool:
        waiting: deque[_Batch] = deque()
        try:
            for index in batches:
                waiting.append(_Batch(pool, slide, grid, index, threads))
                if len(waiting) > threads + AHEAD - 1:
                    ready = waiting.popleft()
                    yield ready.result(), ready.index
            while waiting:
                ready = waiting.popleft()
                yield ready.result(), ready.index
        finally:
            for batch in waiting:
                batch.cancel()


class _Batch:
    """Tiles that are being read, a run of neighbours by each thread."""

    def __init__(
        self, pool: ThreadPoolExecutor, slide: Slide, grid: TileGrid, index: NDArray[np.int64], threads: int
    ) -> None:
        self.index = index
        self._tiles = _room_for(grid, len(index))
        runs = np.array_split(np.arange(len(index)), min(threads, len(index)))
        self._parts = [
            pool.submit(_read_into, self._tiles[run[0] : run[-1] + 1], slide, grid, index[run]) for run in runs
        ]

    def result(self) -> NDArray[np.uint8]:
        """Return the tiles, (b, h, w, 3)."""
        for part in self._parts:
            part.result()
        return self._tiles

    def cancel(self) -> None:
        """Leave out what no thread has begun with."""
        for part in self._parts:
            part.cancel()


def _room_for(grid: TileGrid, count: int) -> NDArray[np.uint8]:
    side = grid.tiling.patch_size
    return np.empty((count, side, side, 3), np.uint8)


def _read(slide: Slide, grid: TileGrid, index: NDArray[np.int64]) -> NDArray[np.uint8]:
    tiles = _room_for(grid, len(index))
    _read_into(tiles, slide, grid, index)
    return tiles


def _read_into(tiles: NDArray[np.uint8], slide: Slide, grid: TileGrid, index: NDArray[np.int64]) -> None:
    side, mpp = grid.tiling.patch_size, grid.delivered_mpp
    for row, (x, y) in enumerate(grid.origins_px0[index].tolist()):
        tiles[row] = slide.read((x, y), (side, side), mpp)
