"""Each tile's quality, and which tiles are left out for it; how it is measured is in `eosin.wsi._scoring`."""

from dataclasses import dataclass, fields
from typing import Annotated, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray
from pydantic import Field

from eosin.options import Options

Share = Annotated[float, Field(ge=0, le=1)]
SCORES = ("blur", "pen", "fold", "background")


class QualityLimits(Options):
    """Which tiles are left out for their quality; none unless a limit is given.

    Parameters
    ----------
    blur : bool
        Measure and store the blur of every tile. It needs the tiles' pixels and is implied by `max_blur`; the other
        scores come from the overview and are always stored.
    max_blur : float or None
        Tiles of a higher blur are left out; 0.9 finds tissue blurred by 1.5 µm or more.
    max_pen : float or None
        Tiles with a larger share of ink are left out.
    max_fold : float or None
        Tiles with a larger share of folds and dark dirt are left out.
    """

    blur: bool = False
    max_blur: Share | None = None
    max_pen: Share | None = None
    max_fold: Share | None = None

    @property
    def measures_blur(self) -> bool:
        """Whether tiles have to be read."""
        return self.blur or self.max_blur is not None


@dataclass(frozen=True)
class TileQuality:
    """Scores of the tiles of a grid, in its order; all from 0 (good) to 1.

    Parameters
    ----------
    blur : (n,) float32
        How much detail between 1 and 8 µm is missing; NaN where it was not measured.
    pen, fold, background : (n,) float32
        Share of the tile that is ink; much darker than the slide's tissue; no tissue.
    """

    blur: NDArray[np.float32]
    pen: NDArray[np.float32]
    fold: NDArray[np.float32]
    background: NDArray[np.float32]

    def __post_init__(self) -> None:
        """Refuse scores of different numbers of tiles."""
        shapes = {getattr(self, name).shape for name in SCORES}
        if len(shapes) != 1 or len(next(iter(shapes))) != 1:
            raise ValueError(f"scores of one grid have one length, not {sorted(shapes)}")

    def select(self, index: ArrayLike) -> Self:
        """Return the scores of the tiles at `index`, as `eosin.wsi._grid.TileGrid.select` does."""
        rows = np.asarray(index)
        chosen = rows if rows.size else np.zeros(0, np.int64)
        return type(self)(*(np.ascontiguousarray(getattr(self, field.name)[chosen]) for field in fields(self)))

    def within(self, limits: QualityLimits) -> tuple[NDArray[np.bool_], str]:
        """Return which tiles keep to all limits that are set, and in words how many do not, and for what.

        What was not measured exceeds no limit.
        """
        stated = {"blur": limits.max_blur, "pen": limits.max_pen, "fold": limits.max_fold}
        bad = {name: getattr(self, name) > limit for name, limit in stated.items() if limit is not None}
        keep = ~np.any(list(bad.values()), axis=0) if bad else np.ones(self.blur.shape, bool)
        lost = ", ".join(f"{found.sum()} by {name}" for name, found in bad.items() if found.any())
        return keep, f"{(~keep).sum()} tiles left out for their quality ({lost})" if lost else ""
