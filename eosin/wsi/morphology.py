"""Growing, closing and sorting out pieces of masks; fast where disks are small, as they are at 8 µm per cell."""

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

Mask = NDArray[np.bool_]
SMALL_RADIUS = 3.0
LARGE_RADIUS = 12.0


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
    labels, count = ndimage.label(mask)
    if count == 0:
        return mask
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
