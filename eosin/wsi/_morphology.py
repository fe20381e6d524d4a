"""Growing, closing and sorting out pieces of masks; fast where disks are small, as they are at 8 µm per cell."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from eosin.wsi._pieces import find_pieces

Mask = NDArray[np.bool_]
SMALL_RADIUS = 3.0
LARGE_RADIUS = 12.0
MANY_PIECES = 200


def grow(mask: Mask, radius: float) -> Mask:
    """Return the cells within `radius` cells of a true one; between 3 and 12 the disk is composed of smaller ones."""
    if radius > LARGE_RADIUS:
        from scipy import ndimage  # a third of a second, and seldom needed

        return np.asarray(ndimage.distance_transform_edt(~mask) <= radius) if mask.any() else mask.copy()
    if radius > SMALL_RADIUS:
        return grow(grow(mask, SMALL_RADIUS), radius - SMALL_RADIUS)
    reach = int(radius)
    wide, half = mask.copy(), 0  # the mask grown sideways
    grown = np.zeros_like(mask)
    for down in range(reach, -1, -1):  # rows of the disk, from its shortest
        while (half + 1) ** 2 + down**2 <= radius**2:
            half += 1
            wide[:, half:] |= mask[:, :-half]
            wide[:, :-half] |= mask[:, half:]
        grown[down:] |= wide[: len(mask) - down]
        grown[: len(mask) - down] |= wide[down:]
    return grown


def window_sums(
    plane: NDArray[np.unsignedinteger[Any]], side: int, *, most: int = 255
) -> NDArray[np.unsignedinteger[Any]]:
    """Return the sums of `side` x `side` cells around each cell; beyond the edge the picture is mirrored.

    `most` is the largest value of a cell: sums are kept in as few bits as it allows.
    """
    return _sums(plane.astype(np.min_scalar_type(most * side**2), copy=False), side)


def window_means(plane: NDArray[np.float32], side: int) -> NDArray[np.float32]:
    """Return the means of `side` x `side` cells around each cell; beyond the edge the picture is mirrored."""
    return np.asarray(_sums(plane, side) / np.float32(side**2))


def _sums(plane: NDArray[Any], side: int) -> NDArray[Any]:
    before = side // 2
    padded = np.pad(plane, (before, side - 1 - before), mode="symmetric")
    height, width = plane.shape
    down = padded[:height].copy()
    for start in range(1, side):
        down += padded[start : start + height]
    across = down[:, :width].copy()
    for start in range(1, side):
        across += down[:, start : start + width]
    return across


def find_windows(mask: Mask, margin: int) -> list[tuple[slice, slice]]:
    """Return the boxes of the connected pieces of a mask, larger by `margin` cells; one for all when they are many."""
    pieces = find_pieces(mask)
    if pieces.count == 0:
        return []
    boxes = pieces.boxes() if pieces.count <= MANY_PIECES else [_extent(mask)]
    return [(_widened(rows, margin), _widened(columns, margin)) for rows, columns in boxes]


def _extent(mask: Mask) -> tuple[slice, slice]:
    """Return the box that holds all true cells; empty when there is none."""
    rows = np.flatnonzero(mask.any(axis=1))
    if not len(rows):
        return slice(0, 0), slice(0, 0)
    top, bottom = int(rows[0]), int(rows[-1]) + 1
    columns = np.flatnonzero(mask[top:bottom].any(axis=0))
    return slice(top, bottom), slice(int(columns[0]), int(columns[-1]) + 1)


def _widened(side: slice, margin: int) -> slice:
    return slice(max(0, side.start - margin), side.stop + margin)


def window_of(mask: Mask, margin: int) -> tuple[slice, slice]:
    """Return the box that holds all true cells, larger by `margin` cells; empty when there is none."""
    rows, columns = _extent(mask)
    return (_widened(rows, margin), _widened(columns, margin)) if rows.stop else (rows, columns)


def close_gaps(mask: Mask, radius: float) -> Mask:
    """Fill what a disk of `radius` cells cannot enter from outside; the picture's edge continues outwards."""
    if radius < 1:
        return mask
    pad = int(np.ceil(radius)) + 1
    padded = np.pad(mask, pad, mode="edge")
    return (~grow(~grow(padded, radius), radius))[pad:-pad, pad:-pad]


def open_threads(mask: Mask, radius: float) -> Mask:
    """Remove what a disk of `radius` cells does not fit into."""
    return ~close_gaps(~mask, radius)


def drop_small(mask: Mask, min_cells: float, *, keep_largest: bool) -> Mask:
    """Return the pieces of at least `min_cells`, and on request the largest whatever its size."""
    pieces = find_pieces(mask)
    if pieces.count == 0:
        return mask
    keep = pieces.sizes >= min_cells
    if keep_largest:
        keep[np.argmax(pieces.sizes)] = True
    return mask if keep.all() else pieces.mask(keep)


def pieces_touching(mask: Mask, seeds: Mask) -> Mask:
    """Return the pieces of a mask that hold at least one seed."""
    pieces = find_pieces(mask)
    keep = pieces.touching(seeds)
    return mask if keep.all() else pieces.mask(keep)


def fill_holes(mask: Mask, max_cells: float) -> Mask:
    """Fill holes of at most `max_cells` that do not touch the picture's edge."""
    gaps = find_pieces(~mask)
    fill = (gaps.sizes <= max_cells) & ~gaps.on_edge()
    return mask | gaps.mask(fill) if fill.any() else mask
