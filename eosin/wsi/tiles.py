"""Tiles of a slide in batches for encoders."""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

from eosin.wsi.colour import in_srgb
from eosin.wsi.grid import TileGrid
from eosin.wsi.slide import Slide

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
        Threads that read; 0 reads in the caller's.

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
        waiting: deque[tuple[Future[NDArray[np.uint8]], NDArray[np.int64]]] = deque()
        try:
            for index in batches:
                waiting.append((pool.submit(_read, slide, grid, index), index))
                if len(waiting) > threads + AHEAD - 1:
                    future, ready = waiting.popleft()
                    yield future.result(), ready
            while waiting:
                future, ready = waiting.popleft()
                yield future.result(), ready
        finally:
            for future, _ in waiting:
                future.cancel()


def _read(slide: Slide, grid: TileGrid, index: NDArray[np.int64]) -> NDArray[np.uint8]:
    side = grid.tiling.patch_size
    tiles = np.empty((len(index), side, side, 3), np.uint8)
    for row, (x, y) in enumerate(grid.origins_px0[index].tolist()):
        tiles[row] = slide.read((x, y), (side, side), grid.delivered_mpp)
    return tiles
