"""Growing, closing and sorting out pieces of masks; fast where disks are small, as they are at 8 µm per cell."""

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

Mask = NDArray[np.bool_]
SMALL_RADIUS = 3.0
LARGE_RADIUS = 12.0
MANY_PIECES = 200


def grow(mask: Mask, radius: float) -> Mask:
    """Return the cells within `radius` cells of a true one; between 3 and 12 the disk is composed of smaller ones."""
    if radius > LARGE_RADIUS:
        return np.asarray(ndimage.distance_transform_edt(~mask) <= radius) if mask.any() else mask.copy()
    if radius > SMALL_RADIUS:
        return grow(grow(mask, SMALL_RADIUS), radius - SMALL_RADIUS)
    reach = int(radius)
    grown = mask.copy()
    for down in range(-reach, reach + 1):
        for right in range(-reach, reach + 1):
            if 0 < down * down + right * right <= radius * radius:
                grown[_kept(-down), _kept(-right)] |= mask[_kept(down), _kept(right)]
    return grown


def _kept(shift: int) -> slice:
    return slice(shift, None) if shift >= 0 else slice(None, shift)


def slide_extremes(plane: NDArray[np.uint8], side: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Return minimum and maximum of every whole window of `side` x `side` cells; smaller by ``side - 1`` each way."""
    low = high = plane
    for axis in (0, 1):
        low, high = _slide(low, side, axis, np.minimum), _slide(high, side, axis, np.maximum)
    return low, high


def _slide(plane: NDArray[np.uint8], side: int, axis: int, pick: np.ufunc) -> NDArray[np.uint8]:
    def cut(start: int, length: int) -> NDArray[np.uint8]:
        return plane[start : start + length] if axis == 0 else plane[:, start : start + length]

    span = 1
    while span < side:
        shift = min(span, side - span)
        length = plane.shape[axis] - shift
        plane = pick(cut(0, length), cut(shift, length))
        span += shift
    return plane


def find_windows(mask: Mask, margin: int) -> list[tuple[slice, slice]]:
    """Return the boxes of the connected pieces of a mask, larger by `margin` cells; one for all when they are many."""
    labels, count = ndimage.label(mask)
    if count == 0:
        return []
    boxes = ndimage.find_objects(labels) if count <= MANY_PIECES else [_extent(mask)]
    return [(_widened(rows, margin), _widened(columns, margin)) for rows, columns in boxes]


def _extent(mask: Mask) -> tuple[slice, slice]:
    rows, columns = (np.flatnonzero(mask.any(axis=axis)) for axis in (1, 0))
    return slice(int(rows[0]), int(rows[-1]) + 1), slice(int(columns[0]), int(columns[-1]) + 1)


def _widened(side: slice, margin: int) -> slice:
    return slice(max(0, side.start - margin), side.stop + margin)


def window_of(mask: Mask, margin: int) -> tuple[slice, slice]:
    """Return the box that holds all true cells, larger by `margin` cells; empty when there is none."""
    if not mask.any():
        return slice(0, 0), slice(0, 0)
    rows, columns = _extent(mask)
    return _widened(rows, margin), _widened(columns, margin)


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
    if not mask.any():
        return mask
    labels, _ = ndimage.label(mask)
    sizes = np.bincount(labels.ravel())
    keep = sizes >= min_cells
    if keep_largest:
        keep[1 + np.argmax(sizes[1:])] = True
    keep[0] = False
    return np.asarray(keep[labels])


def pieces_touching(mask: Mask, seeds: Mask) -> Mask:
    """Return the pieces of a mask that hold at least one seed."""
    labels, count = ndimage.label(mask)
    keep = np.zeros(count + 1, bool)
    keep[labels[seeds]] = True
    keep[0] = False
    return np.asarray(keep[labels])


def fill_holes(mask: Mask, max_cells: float) -> Mask:
    """Fill holes of at most `max_cells` that do not touch the picture's edge."""
    labels, count = ndimage.label(~mask)
    if count == 0:
        return mask
    fill = np.bincount(labels.ravel()) <= max_cells
    for edge in (labels[0], labels[-1], labels[:, 0], labels[:, -1]):
        fill[edge] = False
    fill[0] = True
    return np.asarray(fill[labels])
