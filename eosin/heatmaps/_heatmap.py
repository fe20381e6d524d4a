"""Scores on a tile grid: the one type that every attribution returns and every export reads."""

import math
from collections.abc import Iterator
from dataclasses import KW_ONLY, dataclass, replace
from typing import Literal

import numpy as np
import scipy
from numpy.typing import NDArray

from eosin.wsi._grid import TileGrid

Window = tuple[int, int, int, int]
WEIGHTS = frozenset({"attention", "rollout"})
RELATIVE_TO = {
    "attention": "relative to the slide's other tiles; the same for all classes",
    "rollout": "relative to the slide's other tiles; the same for all classes",
    "alone": "relative to zero, whatever the rest of the slide shows",
    "instance_logit": "relative to zero, whatever the rest of the slide shows",
    "effect": "relative to the same slide without the tile",
    "log_weight_gradient": "relative to the slide's average tile",
    "gradient": "relative to features of zero",
}
"""What the zero, or the average, of each number is: without it a map cannot be read."""


@dataclass(frozen=True, eq=False)
class Heatmap:
    """One number per tile of a grid.

    Parameters
    ----------
    values : (n,) float64
        The score of each tile, in the order of the grid; finite.
    grid : TileGrid
        Where the tiles lie.
    shows : str
        What the number is: ``attention``, ``effect``, ``instance_logit``, ``gradient``, ``rollout`` ...
    label : str
        The same in words for people, for example "attention (percentile of tiles)".
    of : str
        The class, output or branch that the number is about, where files name it.
    scaling : {"plain", "percentile", "relative"}
        Whether the number was made a rank or a multiple of the average tile's.
    is_estimate : bool
        Whether it stands for a number that would be too costly to compute.
    signed : bool
        Whether zero is the middle of the scale: effects have a direction, weights have not.
    reach : float, optional
        Log-odds at which the colours end, so that maps of several slides can be compared; of other numbers, whose
        colours end where the map's own do, None.

    Raises
    ------
    ValueError
        If the number of values differs from the number of tiles, or a value is not finite.
    """

    values: NDArray[np.float64]
    grid: TileGrid
    shows: str
    label: str
    _: KW_ONLY
    of: str = ""
    scaling: Literal["plain", "percentile", "relative"] = "plain"
    is_estimate: bool = False
    signed: bool = False
    reach: float | None = None

    def __post_init__(self) -> None:
        values = np.asarray(self.values, dtype=np.float64)
        if values.shape != (self.grid.n_tiles,):
            raise ValueError(f"{self.kind}: {values.shape} values for {self.grid.n_tiles} tiles")
        if not np.isfinite(values).all():
            raise ValueError(f"{self.kind}: {np.count_nonzero(~np.isfinite(values))} values are not finite")
        object.__setattr__(self, "values", values)

    def __repr__(self) -> str:
        if not len(self.values):
            return f"<Heatmap {self.kind}: no tiles>"
        return f"<Heatmap {self.kind}: {len(self.values)} tiles, {self.values.min():.3g} to {self.values.max():.3g}>"

    @property
    def kind(self) -> str:
        """What the number is, in one word that files carry: ``attention_percentile``, ``effect_estimate_tumour``."""
        parts = (self.shows, "estimate" if self.is_estimate else "", self.of, self.scaling.removeprefix("plain"))
        return "_".join(filter(None, parts))

    @property
    def caption(self) -> str:
        """The label, and what the number is relative to, as every output says it."""
        words = self.label[:1].upper() + self.label[1:]
        relative = RELATIVE_TO.get(self.shows)
        return f"{words}, {relative}" if relative else words

    @property
    def is_weight(self) -> bool:
        """Whether values are shares of the slide that sum to 1, so that they have an average to be multiples of."""
        return self.shows in WEIGHTS and self.scaling == "plain"

    def percentile(self) -> "Heatmap":
        """Return average rank / n × 100: the top tile is 100, equal values share a rank.

        The scaling says which tiles rank above which and nothing about how much more they weigh.
        """
        n = self.grid.n_tiles
        values = scipy.stats.rankdata(self.values) / max(n, 1) * 100
        label = f"{self.label} (percentile of tiles)"
        return replace(self, values=values, scaling="percentile", label=label, signed=False, reach=None)

    def relative(self) -> "Heatmap":
        """Return weight × n: 1 is the share of an average tile. For weights that sum to 1 over the slide."""
        values = self.values * self.grid.n_tiles
        label = f"{self.label} (times the average tile)"
        return replace(self, values=values, scaling="relative", label=label)

    def raster(self, mpp: float, *, window_px0: Window | None = None) -> NDArray[np.float32]:
        """Paint the tiles on a plane.

        Parameters
        ----------
        mpp : float
            Resolution of the plane.
        window_px0 : (x, y, w, h), optional
            The part of the slide that the plane shows, level-0 pixels; the whole slide unless given.

        Returns
        -------
        (h, w) float32
            NaN where no tile lies, the mean where tiles overlap. A pixel belongs to a tile when its centre
            does, so neighbours never overlap or leave a gap; a tile smaller than a pixel marks one pixel.
        """
        height, _ = raster_shape(self.grid, mpp, window_px0)
        return next(self.raster_strips(mpp, rows=height, window_px0=window_px0))

    def raster_strips(
        self, mpp: float, *, rows: int, window_px0: Window | None = None
    ) -> Iterator[NDArray[np.float32]]:
        """Yield the plane of `raster` from top to bottom, `rows` rows at a time: memory is one strip."""
        height, width = raster_shape(self.grid, mpp, window_px0)
        boxes, tiles = raster_boxes(self.grid, mpp, window_px0)
        # sorted by their upper edge, the boxes that touch a strip are neighbours
        order = np.argsort(boxes[:, 1], kind="stable")
        boxes, values = boxes[order], self.values[tiles[order]]
        # a box that begins above a strip may reach into it
        tallest = int((boxes[:, 3] - boxes[:, 1]).max(initial=0))
        for top in range(0, height, rows):
            bottom = min(top + rows, height)
            first, last = np.searchsorted(boxes[:, 1], [top - tallest, bottom])
            shift = np.array([0, top, 0, top])
            yield _mean_of_boxes(boxes[first:last] - shift, values[first:last], (bottom - top, width))


def raster_shape(grid: TileGrid, mpp: float, window_px0: Window | None = None) -> tuple[int, int]:
    """Return (height, width) in pixels of the slide, or of a window of it, as `read_overview` delivers at `mpp`."""
    sides = grid.slide_size_px0 if window_px0 is None else window_px0[2:]
    width, height = (max(1, math.ceil(side * grid.slide_mpp / mpp - 1e-6)) for side in sides)
    return height, width


def raster_boxes(
    grid: TileGrid, mpp: float, window_px0: Window | None = None
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the pixels that tiles cover at `mpp` and which tiles these are.

    Returns
    -------
    boxes : (m, 4) int64
        x0, y0, x1, y1, half open, inside the plane, at least one pixel each.
    tiles : (m,) int64
        Their indices in the grid; tiles outside the window are left out.
    """
    height, width = raster_shape(grid, mpp, window_px0)
    corner = np.tile((0, 0) if window_px0 is None else window_px0[:2], 2)
    exact = (_cells_px0(grid) - corner) * (grid.slide_mpp / mpp)
    # a pixel belongs to the tile that holds its centre; the tolerance keeps x.5 on one side in floating point
    boxes = np.ceil(exact - 0.5 - 1e-9).astype(np.int64)
    middle = np.floor((exact[:, :2] + exact[:, 2:]) / 2).astype(np.int64)
    holds_none = boxes[:, 2:] <= boxes[:, :2]
    boxes[:, :2] = np.where(holds_none, middle, boxes[:, :2])
    boxes[:, 2:] = np.where(holds_none, middle + 1, boxes[:, 2:])
    boxes = np.clip(boxes, 0, [width, height, width, height])
    tiles = np.flatnonzero((boxes[:, 2:] > boxes[:, :2]).all(axis=1))
    return boxes[tiles], tiles


def _cells_px0(grid: TileGrid) -> NDArray[np.float64]:
    """Return the tiles' boxes before their origins were rounded, when the grid is our lattice without overlap.

    Rounded neighbours may lie one level-0 pixel apart, which a raster would show as a line through the map.
    """
    boxes = grid.boxes_px0().astype(np.float64)
    step = grid.tiling.patch_size * grid.delivered_mpp / grid.slide_mpp
    places = np.round(grid.origins_px0 / step)
    if (
        grid.tiling.overlap
        or abs(step - grid.tile_px0) > 0.5
        or (np.abs(places * step - grid.origins_px0) > 0.51).any()
    ):
        return boxes
    return np.concatenate([places, places + 1], axis=1) * step


def _mean_of_boxes(
    boxes: NDArray[np.int64], values: NDArray[np.float64], shape: tuple[int, int]
) -> NDArray[np.float32]:
    total = np.zeros(shape)
    count = np.zeros(shape, dtype=np.uint16)
    for (x0, y0, x1, y1), value in zip(np.maximum(boxes, 0).tolist(), values.tolist(), strict=True):
        total[y0:y1, x0:x1] += value
        count[y0:y1, x0:x1] += 1
    plane = np.full(shape, np.nan, dtype=np.float32)
    np.divide(total, count, out=plane, where=count > 0, casting="same_kind")
    return plane
