"""Connected pieces of a mask, found on its horizontal runs instead of its cells.

A mask of 10 million cells has some ten thousand runs, so telling its pieces costs a tenth of labelling every cell.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

Mask = NDArray[np.bool_]
Index = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Pieces:
    """The pieces of a mask whose cells touch by their sides.

    Attributes
    ----------
    shape : tuple of int
        Height and width of the mask.
    starts, stops : (r,) int64
        Runs of true cells, in a picture that is one cell wider than the mask, row after row.
    labels : (r,) int64
        The piece that each run belongs to, from 0 on.
    count : int
        Number of pieces.
    """

    shape: tuple[int, int]
    starts: Index
    stops: Index
    labels: Index
    count: int

    @property
    def pitch(self) -> int:
        """Cells from one row to the next."""
        return self.shape[1] + 1

    @cached_property
    def sizes(self) -> Index:
        """Cells of each piece, (count,)."""
        return np.bincount(self.labels, self.stops - self.starts, self.count).astype(np.int64)

    def on_edge(self) -> Mask:
        """Return which pieces touch the picture's edge, (count,)."""
        height, width = self.shape
        column = self.starts % self.pitch
        at_edge = (self.starts < self.pitch) | (self.starts >= (height - 1) * self.pitch)
        at_edge |= (column == 0) | (self.stops - self.starts + column == width)
        return np.bincount(self.labels[at_edge], minlength=self.count) > 0

    def touching(self, seeds: Mask) -> Mask:
        """Return which pieces hold a true cell of another mask of the same shape, (count,)."""
        starts, stops = find_runs(seeds)
        mine, _ = _meeting(self.starts, self.stops, starts, stops)
        return np.bincount(self.labels[mine], minlength=self.count) > 0

    def boxes(self) -> list[tuple[slice, slice]]:
        """Return the rows and columns that hold each piece."""
        if self.count == 0:
            return []
        order = np.argsort(self.labels, kind="stable")
        first = np.flatnonzero(np.diff(self.labels[order], prepend=-1))
        row, left = np.divmod(self.starts[order], self.pitch)
        right = left + (self.stops - self.starts)[order]
        rows = np.minimum.reduceat(row, first), np.maximum.reduceat(row, first) + 1
        columns = np.minimum.reduceat(left, first), np.maximum.reduceat(right, first)
        edges = np.stack([*rows, *columns], axis=1).tolist()
        return [(slice(top, bottom), slice(x0, x1)) for top, bottom, x0, x1 in edges]

    def mask(self, keep: Mask) -> Mask:
        """Return the mask of the pieces to keep, (count,) to (h, w)."""
        kept = keep[self.labels]
        steps = np.zeros(self.shape[0] * self.pitch, np.int8)
        steps[self.starts[kept]] = 1
        steps[self.stops[kept]] = -1
        inside = np.cumsum(steps, dtype=np.int8).view(np.bool_)
        return inside.reshape(self.shape[0], self.pitch)[:, :-1]


def find_pieces(mask: Mask) -> Pieces:
    """Find the pieces of a mask.

    Parameters
    ----------
    mask : (h, w) bool
    """
    height, width = mask.shape
    none = np.zeros(0, np.int64)
    if not mask.any():
        return Pieces((height, width), none, none, none, 0)
    starts, stops = find_runs(mask)
    pitch = width + 1
    above, below = _meeting(starts + pitch, stops + pitch, starts, stops)
    count, labels = _connect(len(starts), above, below)
    return Pieces((height, width), starts, stops, labels, count)


def _connect(number: int, one: Index, other: Index) -> tuple[int, Index]:
    """Number the components of a graph by their first nodes; links lead from `one` to `other`.

    Every node points to a smaller one of its component, or to itself. In each turn the ends of links that differ are
    joined, and all pointers followed to their end, so that a few turns are enough.
    """
    root = np.arange(number)
    while True:
        a, b = root[one], root[other]
        apart = a != b
        if not apart.any():
            break
        one, other, a, b = one[apart], other[apart], a[apart], b[apart]
        np.minimum.at(root, np.maximum(a, b), np.minimum(a, b))
        further = root[root]
        while not np.array_equal(further, root):
            root, further = further, further[further]
    is_first = root == np.arange(number)
    return int(np.count_nonzero(is_first)), (np.cumsum(is_first) - 1)[root]


def find_runs(mask: Mask) -> tuple[Index, Index]:
    """Return where the runs of true cells start and stop, in a picture one cell wider than the mask."""
    height, width = mask.shape
    wide = np.zeros(height * (width + 1) + 1, np.bool_)
    wide[1:].reshape(height, width + 1)[:, :-1] = mask
    edges = np.flatnonzero(wide[1:] != wide[:-1])
    return edges[0::2], edges[1::2]


def _meeting(starts: Index, stops: Index, others: Index, ends: Index) -> tuple[Index, Index]:
    """Return the pairs of runs, one of each list, that share a place; both lists ascend."""
    first, last = np.searchsorted(ends, starts, "right"), np.searchsorted(others, stops, "left")
    number = np.maximum(last - first, 0)
    mine = np.repeat(np.arange(len(starts)), number)
    offset = np.arange(len(mine)) - np.repeat(np.cumsum(number) - number, number)
    return mine, first[mine] + offset
