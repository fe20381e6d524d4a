"""Which tiles of a bag lie nearest to each tile."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

TIE = (1e-3, 1.7e-4)  # which of equally near tiles comes first: by x, then by y


def nearest_tiles(places: Tensor, lengths: Sequence[int], count: int) -> tuple[Tensor, Tensor]:
    """Return the `count` tiles of the same bag that lie nearest to each tile, the tile itself first.

    Of tiles that are equally near the one with the smaller x, then y, comes first, so that the order of the list does
    not matter; tiles in one and the same place are each other's nearest.

    Parameters
    ----------
    places : (N, 2) float
        Where tiles lie, x then y.
    lengths : sequence of int
        Tiles per bag.
    count : int
        Tiles k, with itself.

    Returns
    -------
    (N, k) int64
        Their rows among the N; the tile's own where the bag is smaller.
    (N, k) bool
        Whether there are so many.
    """
    from scipy.spatial import cKDTree  # slow to import, and few methods need it

    where = places.detach().double().cpu().numpy()
    own = np.arange(len(where))
    found = np.repeat(own[:, None], count, 1)
    there = np.zeros(found.shape, bool)
    start = 0
    for length in lengths:
        rows, most = slice(start, start + length), min(length, count)
        if length:
            # the square of a distance plus a slope by x and y is, but for a constant, that to a shifted point
            _, near = cKDTree(where[rows]).query(where[rows] - np.array(TIE) / 2, k=range(1, most + 1))
            found[rows, :most] = start + _own_first(near)
            there[rows, :most] = True
        start += length
    return torch.from_numpy(found).to(places.device), torch.from_numpy(there).to(places.device)


def _own_first(near: np.ndarray) -> np.ndarray:
    """Put each tile in front of its list, where others in the same place may stand before it or crowd it out."""
    own = np.arange(len(near))[:, None]
    listed = near == own
    place = np.where(listed.any(1), listed.argmax(1), near.shape[1] - 1)
    others = np.arange(near.shape[1])[None] != place[:, None]
    return np.concatenate([own, near[others].reshape(len(near), -1)], 1)
