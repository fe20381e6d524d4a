"""From a coarse picture to the cells of the mask: finer pixels are read only where they can change the outcome.

Blank glass and the inside of tissue look the same at 16 µm per pixel as at 8: there the coarse decision stands. Along
the border of the tissue, and where ink has to be told from tissue by its grain, the slide is read again at the mask's
own resolution. The border moves by less than one coarse cell.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from eosin.wsi._ink import INK_VARIATION, PEN_MIN_UM2, find_even, variation
from eosin.wsi._morphology import Mask, drop_small, fill_holes, find_windows, grow, window_of
from eosin.wsi._pieces import find_pieces
from eosin.wsi._slide import Slide
from eosin.wsi._stain import bends_of, darkest_of, is_stained, lightest_of, to_light

FACTOR = 2
BLOCK_CELLS = 64  # coarse; 256 stored pixels of 4 µm
SQUARE = 1.5  # radius of the disk that is 3 x 3 cells
MARGIN_CELLS = 4
MANY_SAMPLES = 4
SAMPLE_CELLS = 128


@dataclass(frozen=True, eq=False)
class Closer:
    """Reads parts of a slide at `FACTOR` times the resolution of a picture of it.

    Attributes
    ----------
    slide : Slide
        Open.
    mpp : float
        µm per fine cell.
    glass : (3,) float64
        Colour of empty glass.
    """

    slide: Slide
    mpp: float
    glass: NDArray[np.float64]

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the slide in fine cells."""
        width, height = (max(1, math.ceil(side * self.slide.mpp / self.mpp - 1e-6)) for side in self.slide.size_px0)
        return height, width

    def read(self, place: tuple[slice, slice]) -> NDArray[np.uint8]:
        """Return the pixels of some fine rows and columns, (h, w, 3)."""
        rows, columns = place
        px0 = self.mpp / self.slide.mpp
        origin = (round(columns.start * px0), round(rows.start * px0))
        return self.slide.read(origin, (columns.stop - columns.start, rows.stop - rows.start), self.mpp)

    def darkest(self, place: tuple[slice, slice]) -> NDArray[np.uint8]:
        """Return the darkest channel, relative to glass, of some fine rows and columns."""
        return darkest_of(to_light(self.read(place), self.glass))

    def is_stained(self, pixels: NDArray[np.uint8], min_stain: float) -> Mask:
        """Return which pixels, (n, 3) RGB, are stained, (n,)."""
        planes = to_light(pixels[None], self.glass)
        return is_stained(darkest_of(planes)[0], lightest_of(planes)[0], min_stain)

    def samples(self, mask: Mask, origin: tuple[int, int]) -> Iterator[tuple[tuple[slice, slice], Mask]]:
        """Yield fine rows and columns of some pieces of a coarse mask, and which of their cells belong to it.

        Of the largest pieces the middle of each, as far as they are large.
        """
        pieces = find_pieces(mask)
        order = np.argsort(pieces.sizes)[::-1][:MANY_SAMPLES].tolist()
        boxes = pieces.boxes()
        for number in order:
            place = tuple(_middle_of(side, SAMPLE_CELLS) for side in boxes[number])
            yield self.finer(place, origin), enlarge(mask[place])

    def finer(self, place: tuple[slice, ...], origin: tuple[int, int]) -> tuple[slice, slice]:
        """Return the fine rows and columns of coarse ones that count from a coarse origin."""
        rows, columns = (
            slice(FACTOR * (side.start + start), FACTOR * (side.stop + start))
            for side, start in zip(place, origin, strict=True)
        )
        return rows, columns


@dataclass(frozen=True, eq=False)
class FinerGrain:
    """The grain of a coarse picture, seen in the finer pixels beneath it; implements `eosin.wsi._ink.Grain`.

    Attributes
    ----------
    closer : Closer
        Reads them.
    darkest : (h, w) uint8
        A window of the coarse picture.
    bends : (h, w) uint16
        Its bends.
    origin : tuple of int
        First row and column of the window.
    """

    closer: Closer
    darkest: NDArray[np.uint8]
    bends: NDArray[np.uint16]
    origin: tuple[int, int]

    def where_even(self) -> Mask:
        """Return where density is high and even: what looks so from afar is read."""
        mpp = FACTOR * self.closer.mpp
        even: Mask = np.zeros(self.darkest.shape, bool)
        perhaps = drop_small(find_even(self.darkest, self.bends, side=1), PEN_MIN_UM2 / mpp**2, keep_largest=False)
        for window in find_windows(perhaps, MARGIN_CELLS):
            height, width = self.darkest.shape
            rows, columns = window
            place = slice(rows.start, min(rows.stop, height)), slice(columns.start, min(columns.stop, width))
            darkest = self.closer.darkest(self.closer.finer(place, self.origin))
            found = find_even(darkest, bends_of(darkest))
            even[place] |= found[::2, ::2] | found[1::2, ::2] | found[::2, 1::2] | found[1::2, 1::2]
        return even

    def is_even(self, ink: Mask) -> bool:
        """Return whether most of what may be ink is even, as seen in its largest pieces."""
        varied = [
            variation(self.closer.darkest(place), inked) for place, inked in self.closer.samples(ink, self.origin)
        ]
        values = np.concatenate(varied)
        return bool(values.size and np.median(values) < INK_VARIATION)


def _middle_of(side: slice, longest: int) -> slice:
    spare = max(0, side.stop - side.start - longest) // 2
    return slice(side.start + spare, side.stop - spare)


def enlarge(mask: Mask) -> Mask:
    """Return a mask of `FACTOR` times as many cells each way."""
    doubled = (mask.view(np.uint8).astype(np.uint16) * 0x0101).view(np.bool_)
    return np.repeat(doubled, FACTOR, axis=0)


def refine(
    coarse: Mask, pen: Mask, closer: Closer, *, min_stain: float, thread_cells: float, min_cells: float, max_hole: float
) -> Mask:
    """Return the mask of the fine cells.

    Parameters
    ----------
    coarse : (h, w) bool
        Tissue on the coarse lattice.
    pen : (h, w) bool
        Cells that are not tissue whatever their stain.
    closer : Closer
        Reads the border.
    min_stain : float
        Difference of optical density from which a cell is stained.
    thread_cells : float
        Radius of the threads that are removed, in fine cells; less than one removes none.
    min_cells, max_hole : float
        Smaller pieces are dropped, but for the largest, and smaller holes filled; in fine cells.
    """
    height, width = closer.size
    mask = np.zeros((FACTOR * coarse.shape[0], FACTOR * coarse.shape[1]), bool)
    place = window_of(coarse, 2)
    inside = coarse[place]
    if inside.size:
        origin = (place[0].start, place[1].start)
        core = ~grow(~inside, SQUARE)
        border = grow(inside, SQUARE) & ~core & ~pen[place]
        found, cells = enlarge(core), enlarge(border)
        top, left = (FACTOR * start for start in origin)
        cells[height - top :], cells[:, width - left :] = False, False
        at, pixels = _read_cells(closer, cells, _blocks(border, origin), origin)
        found.ravel()[at] = closer.is_stained(pixels, min_stain)
        smooth = _smoothed(found, cells, threads=thread_cells >= 1)
        kept = fill_holes(drop_small(smooth, min_cells, keep_largest=True), max_hole)
        if pen.any():
            kept &= ~enlarge(pen[place])
        window = closer.finer((slice(0, inside.shape[0]), slice(0, inside.shape[1])), origin)
        mask[window] = kept if kept.any() else enlarge(inside)
    return mask[:height, :width]


def _read_cells(
    closer: Closer, cells: Mask, blocks: Iterator[tuple[slice, slice]], origin: tuple[int, int]
) -> tuple[NDArray[np.int64], NDArray[np.uint8]]:
    """Return where the true cells of a fine window lie, (n,), and their pixels, (n, 3), read block by block."""
    places, colours = [np.zeros(0, np.int64)], [np.zeros((0, 3), np.uint8)]
    height, width = closer.size
    for block in blocks:
        (rows, columns), inner = closer.finer(block, origin), closer.finer(block, (0, 0))
        row, column = np.divmod(np.flatnonzero(cells[inner]), FACTOR * (block[1].stop - block[1].start))
        places.append((row + inner[0].start) * cells.shape[1] + column + inner[1].start)
        here = slice(rows.start, min(rows.stop, height)), slice(columns.start, min(columns.stop, width))
        colours.append(closer.read(here)[row, column])
    return np.concatenate(places), np.concatenate(colours)


def _blocks(border: Mask, origin: tuple[int, int]) -> Iterator[tuple[slice, slice]]:
    """Yield the blocks of a window that hold a part of the border; blocks count from the slide's corner."""
    rows, columns = (
        [0, *range(BLOCK_CELLS - start % BLOCK_CELLS, side, BLOCK_CELLS)]
        for side, start in zip(border.shape, origin, strict=True)
    )
    held = np.logical_or.reduceat(np.logical_or.reduceat(border, rows, axis=0), columns, axis=1)
    for row, column in np.argwhere(held).tolist():
        bottom, right = [*rows[1:], border.shape[0]][row], [*columns[1:], border.shape[1]][column]
        yield slice(rows[row], bottom), slice(columns[column], right)


def _smoothed(mask: Mask, border: Mask, *, threads: bool) -> Mask:
    """Smooth the border: each of its cells is as most of its 3 x 3 neighbours; remove threads of two cells on request.

    Only the cells of the border are looked at, so that the cost grows with its length.
    """
    padded = np.pad(mask, 1)
    flat, pitch = padded.ravel(), padded.shape[1]
    cells = np.flatnonzero(np.pad(border, 1))
    steps = [down * pitch + right for down in (-1, 0, 1) for right in (-1, 0, 1)]

    def count() -> NDArray[np.uint8]:
        number = np.zeros(len(cells), np.uint8)
        for step in steps:
            number += flat[cells + step].view(np.uint8)
        return number

    flat[cells] = count() >= 5
    if threads:
        before = flat[cells]
        flat[cells] = count() == 9
        flat[cells] = before & (count() > 0)
    return padded[1:-1, 1:-1]
