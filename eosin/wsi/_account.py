"""What became of a slide's tissue on the way to its tiles, as numbers."""

from dataclasses import dataclass

import numpy as np

from eosin.wsi._grid import TileGrid
from eosin.wsi._tissue import TissueMask

MAX_LOSS = 0.2
LOSSY = f"more than {MAX_LOSS:.0%} of the tissue is left out"
SAMPLE_CELLS = 300_000


@dataclass(frozen=True)
class Account:
    """Tissue found, and the shares of it that no tile shows.

    Parameters
    ----------
    found_um2 : float
        Area of the tissue, with what was left out of the mask.
    small, ink : float
        Shares in pieces that are too small, and under marker ink.
    edges : float
        Share beyond the last whole tile of a row or column.
    tiles : float
        Share in tiles that hold too little tissue.
    """

    found_um2: float
    small: float
    ink: float
    edges: float
    tiles: float

    @property
    def lost(self) -> float:
        """Share of the tissue that no tile shows."""
        return self.small + self.ink + self.edges + self.tiles

    def in_words(self) -> list[str]:
        """Return the account as notes of a record; none when there is no tissue."""
        if not self.found_um2:
            return []
        words = {
            "in small pieces": self.small,
            "under ink": self.ink,
            "at the edges": self.edges,
            "in tiles with too little of it": self.tiles,
        }
        parts = ", ".join(f"{share:.0%} {where}" for where, share in words.items() if share >= 0.005)
        found = f"{self.found_um2 / 1e6:.3g} mm² of tissue"
        return [f"{found}, left out: {parts}" if parts else found, *([LOSSY] if self.lost > MAX_LOSS else [])]


def account_for(mask: TissueMask, grid: TileGrid) -> Account:
    """Count the tissue of a mask that the tiles of a grid show, and where the rest is.

    Parameters
    ----------
    mask : TissueMask
    grid : TileGrid
        All tiles with enough tissue; what is left out for its quality is counted elsewhere.
    """
    found = mask.area_um2 + mask.small_um2 + mask.ink_um2
    if not found:
        return Account(0.0, 0.0, 0.0, 0.0, 0.0)
    rows, columns = mask.window
    step = max(1, int(np.sqrt(mask.mask[rows, columns].size / SAMPLE_CELLS)))  # a share needs no more
    y, x = np.nonzero(mask.mask[rows, columns][::step, ::step])
    cells = np.stack([columns.start + step * x + 0.5, rows.start + step * y + 0.5], axis=1)
    points = cells * mask.px0_per_cell
    width, height = grid.reach_px0()
    beyond = (points[:, 0] >= width) | (points[:, 1] >= height)
    dropped = ~beyond & ~grid.covers(points)
    inside = mask.area_um2 / found / max(len(points), 1)
    edges, tiles = np.count_nonzero(beyond) * inside, np.count_nonzero(dropped) * inside
    return Account(found, mask.small_um2 / found, mask.ink_um2 / found, edges, tiles)
