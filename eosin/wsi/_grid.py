"""Which squares of a slide become tiles: pure geometry in level-0 pixels."""

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray
from pydantic import Field, model_validator

from eosin.errors import ConfigError, SlideError
from eosin.options import Options

if TYPE_CHECKING:  # the grid is imported by packages that know nothing of pixels
    from eosin.wsi._tissue import TissueMask

MAX_TILES = 4_000_000


class Tiling(Options):
    """How a slide is cut into tiles.

    Parameters
    ----------
    mpp : float
        µm per pixel of the delivered tile.
    patch_size : int
        Side of the delivered tile in pixels.
    overlap : int
        Delivered pixels that neighbours share; less than `patch_size`.
    min_tissue : float
        Smallest share of a tile's area that is tissue.
    max_upsampling : float
        Largest factor by which a slide may be coarser than `mpp`.
    tolerance : float
        A slide whose own mpp, or a power of two times that, is within this relative distance of `mpp` is delivered
        unresampled, or as plain averages.
    edges : {"drop", "pad"}
        Tiles that stick out of the slide at its right and lower edge are left out, or kept and filled with background.
    icc : bool
        Convert colours to sRGB by the slide's ICC profile, where it has one, for the mask as for the tiles.
    """

    mpp: Annotated[float, Field(ge=0.05, le=50)] = 0.5
    patch_size: Annotated[int, Field(ge=8, le=16384)] = 256
    overlap: Annotated[int, Field(ge=0)] = 0
    min_tissue: Annotated[float, Field(ge=0, le=1)] = 0.25
    max_upsampling: Annotated[float, Field(ge=1, le=2)] = 1.1
    tolerance: Annotated[float, Field(ge=0, le=0.05)] = 0.01
    edges: Literal["drop", "pad"] = "drop"
    icc: bool = False

    @model_validator(mode="after")
    def _overlap_leaves_a_step(self) -> Self:
        if self.overlap >= self.patch_size:
            raise ValueError(f"overlap {self.overlap} must be smaller than patch_size {self.patch_size}")
        return self

    @property
    def folder(self) -> str:
        """Name of the tiling's folder in a job, for example ``0.5mpp_256px_0px_overlap``."""
        return f"{self.mpp:g}mpp_{self.patch_size}px_{self.overlap}px_overlap"

    @property
    def tile_um2(self) -> float:
        """Area of a tile."""
        return (self.patch_size * self.mpp) ** 2

    def step_px0(self, slide_mpp: float) -> float:
        """Return how far apart neighbouring tiles of a slide begin, in its level-0 pixels; rarely a whole number."""
        return (self.patch_size - self.overlap) * self.delivered_mpp(slide_mpp) / slide_mpp

    def delivered_mpp(self, slide_mpp: float) -> float:
        """Return the mpp that tiles of a slide really have.

        Its own, or its own times a power of two, when that is within the tolerance; else what was asked for.
        """
        doublings = max(0, round(math.log2(self.mpp / slide_mpp)))
        own = slide_mpp * 2**doublings
        return own if abs(own / self.mpp - 1) <= self.tolerance else self.mpp


@dataclass(frozen=True)
class TileGrid:
    """The tiles of one slide.

    Parameters
    ----------
    origins_px0 : (n, 2) int64
        Top-left corners, x then y, level-0 pixels; row-major.
    tile_px0 : int
        Side of a tile in level-0 pixels.
    tiling : Tiling
        What was asked for.
    slide_size_px0 : tuple of int
        Width and height of the slide.
    slide_mpp : float
        µm per level-0 pixel.
    image : str
        `eosin.wsi._slide.Slide.image` of the slide; empty where it is not known.
    """

    origins_px0: NDArray[np.int64]
    tile_px0: int
    tiling: Tiling
    slide_size_px0: tuple[int, int]
    slide_mpp: float
    image: str = ""

    def __post_init__(self) -> None:
        """Refuse arrays that are not a list of points."""
        if self.origins_px0.ndim != 2 or self.origins_px0.shape[1] != 2 or self.origins_px0.dtype != np.int64:
            raise ValueError(f"origins_px0 is {self.origins_px0.dtype} {self.origins_px0.shape}, not int64 (n, 2)")

    def __repr__(self) -> str:
        width, height = self.slide_size_px0
        return f"<TileGrid: {self.n_tiles} tiles of {self.tiling.folder} on {width} x {height} px>"

    @property
    def n_tiles(self) -> int:
        """Number of tiles."""
        return len(self.origins_px0)

    @property
    def delivered_mpp(self) -> float:
        """µm per pixel of a delivered tile."""
        return self.tiling.delivered_mpp(self.slide_mpp)

    def boxes_px0(self) -> NDArray[np.int64]:
        """Return (n, 4) boxes x0, y0, x1, y1 in level-0 pixels; x1 and y1 are exclusive."""
        return np.concatenate([self.origins_px0, self.origins_px0 + self.tile_px0], axis=1)

    def places(self) -> NDArray[np.float32]:
        """Return where the tiles lie, (n, 2), x then y in steps of the lattice, from its leftmost and uppermost tile.

        Neighbours are 1 apart on every slide, whatever its resolution.
        """
        first = self.origins_px0.min(axis=0, initial=np.iinfo(np.int64).max)
        return np.asarray((self.origins_px0 - first) / self.tiling.step_px0(self.slide_mpp), dtype=np.float32)

    def reach_px0(self) -> tuple[int, int]:
        """Return where the lattice ends: right and lower side of the last tile that it has room for."""
        step = self.tiling.step_px0(self.slide_mpp)
        ends = [
            _axis_origins(side, self.tile_px0, step, self.tiling.edges)[-1:] + self.tile_px0
            for side in self.slide_size_px0
        ]
        width, height = (int(end.sum()) for end in ends)
        return width, height

    def covers(self, points_px0: NDArray[np.float64]) -> NDArray[np.bool_]:
        """Return which points, (n, 2) x and y in level-0 pixels, lie in a tile, (n,)."""
        found = np.zeros(len(points_px0), bool)
        if not self.n_tiles:
            return found
        step = self.tiling.step_px0(self.slide_mpp)
        column, row = np.rint(self.origins_px0 / step).astype(np.int64).T
        taken = np.zeros((row.max() + 1, column.max() + 1), bool)
        taken[row, column] = True
        for back in np.ndindex(2 * (math.ceil(self.tile_px0 / step - 1e-6),)):  # overlapping tiles share points
            number = (points_px0 // step).astype(np.int64) - back
            held = (
                (number >= 0) & (number < taken.shape[::-1]) & (points_px0 < (number * step + 0.5) // 1 + self.tile_px0)
            )
            inside = held.all(axis=1)
            x, y = number[inside].T
            found[inside] |= taken[y, x]
        return found

    def select(self, index: ArrayLike) -> Self:
        """Return the grid of the tiles at `index`, in that order; a boolean mask is accepted too."""
        rows = np.asarray(index)
        chosen = np.ascontiguousarray(self.origins_px0[rows if rows.size else np.zeros(0, np.int64)])
        return replace(self, origins_px0=chosen)


def make_grid(
    mask: "TissueMask",
    tiling: Tiling,
    *,
    slide_size_px0: tuple[int, int],
    slide_mpp: float,
    path: Path | str = "slide",
) -> TileGrid:
    """Lay the lattice of a tiling over a slide and keep the tiles that lie on tissue; see `lay_grid`.

    Parameters
    ----------
    mask : TissueMask
    tiling : Tiling
    slide_size_px0 : tuple of int
        Width and height in level-0 pixels.
    slide_mpp : float
        µm per level-0 pixel.
    path : Path or str
        Named in errors.

    Returns
    -------
    TileGrid
        Tiles row by row from top to bottom.

    Raises
    ------
    ConfigError
        If the slide would have more tiles than `MAX_TILES`.
    SlideError
        Code ``too-coarse`` if the slide is coarser than the tiles.
    """
    return lay_grid(mask, tiling, slide_size_px0=slide_size_px0, slide_mpp=slide_mpp, path=path)[0]


def lay_grid(
    mask: "TissueMask",
    tiling: Tiling,
    *,
    slide_size_px0: tuple[int, int],
    slide_mpp: float,
    path: Path | str = "slide",
) -> tuple[TileGrid, NDArray[np.float64]]:
    """Lay the lattice of a tiling over a slide and keep the tiles that lie on tissue.

    The lattice starts at (0, 0). Origin k is the exact position rounded once, ``round(k * step)``, so that
    rounding never adds up; tiles that stick out of the slide are left out, or kept with `Tiling.edges` "pad".

    Parameters
    ----------
    mask : TissueMask
        Where tissue is.
    tiling : Tiling
        Size, mpp, overlap and the share of tissue a tile needs.
    slide_size_px0 : tuple of int
        Width and height, level-0 pixels.
    slide_mpp : float
        µm per level-0 pixel.
    path : Path or str
        Named in the error.

    Returns
    -------
    grid : TileGrid
        Row-major (y, then x); may be empty.
    tissue : (n,) float64
        Share of each tile that is tissue.

    Raises
    ------
    SlideError
        Code ``too-coarse`` if the slide would have to be upsampled by more than `Tiling.max_upsampling`.
    """
    scale = _px0_per_delivered_px(tiling, slide_mpp, path)
    tile_px0 = max(1, round(tiling.patch_size * scale))
    step = tiling.step_px0(slide_mpp)
    xs, ys = (_axis_origins(side, tile_px0, step, tiling.edges) for side in slide_size_px0)
    if len(xs) * len(ys) > MAX_TILES:
        raise ConfigError(
            f"the tiling has {len(xs) * len(ys)} tiles on this slide, more than the limit of "
            f"{MAX_TILES}; use a larger mpp or patch size"
        )
    share = mask.lattice(xs, ys, tile_px0)
    rows, columns = np.nonzero((share >= tiling.min_tissue - 1e-9) & (share > 0))
    origins = np.stack([xs[columns], ys[rows]], axis=1)
    return TileGrid(origins, tile_px0, tiling, slide_size_px0, slide_mpp), share[rows, columns]


def _px0_per_delivered_px(tiling: Tiling, slide_mpp: float, path: Path | str) -> float:
    if slide_mpp > tiling.mpp * tiling.max_upsampling and tiling.delivered_mpp(slide_mpp) != slide_mpp:
        raise SlideError(
            path,
            f"{tiling.mpp:g} µm/px was requested, but the finest level has {slide_mpp:.4g}; request a larger mpp",
            code="too-coarse",
        )
    return tiling.delivered_mpp(slide_mpp) / slide_mpp


def _axis_origins(side_px0: int, tile_px0: int, step_px0: float, edges: str) -> NDArray[np.int64]:
    origins = np.floor(np.arange(int(side_px0 / step_px0) + 2) * step_px0 + 0.5).astype(np.int64)
    if edges == "drop":
        return np.asarray(origins[origins + tile_px0 <= side_px0])
    covered = np.concatenate([[0], origins[:-1] + tile_px0])  # before each tile
    return np.asarray(origins[covered < side_px0])
