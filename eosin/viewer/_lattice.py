"""Tiles as the cells of a small picture: one transfer to the browser whatever their number."""

from dataclasses import dataclass

import numpy as np
import shapely
from numpy.typing import NDArray

from eosin.heatmaps._heatmap import raster_boxes, raster_shape
from eosin.wsi._grid import TileGrid

MAX_CELLS = 4_000_000
Indices = NDArray[np.int64]
Points = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Lattice:
    """The cells that tiles cover.

    A cell is as wide as the step from tile to tile, so that a tile without overlap is one cell; places off any lattice
    get cells of a quarter of a tile.

    Parameters
    ----------
    shape : (h, w)
        Of the picture; it is cut to the tiles.
    origin_um : (x, y)
        Upper left corner of the picture, y downwards from the slide's corner.
    cell_um : float
    cells, tiles : (m,) int64
        Which cell, counted row by row, belongs to which tile; overlapping tiles share cells.
    """

    shape: tuple[int, int]
    origin_um: tuple[float, float]
    cell_um: float
    cells: Indices
    tiles: Indices

    @property
    def size_um(self) -> tuple[float, float]:
        """Width and height."""
        return self.shape[1] * self.cell_um, self.shape[0] * self.cell_um

    def paint(self, values: NDArray[np.float64]) -> NDArray[np.float32]:
        """Return the picture (h, w) of one value per tile (n,): NaN where no tile is, the mean where tiles overlap."""
        count = np.bincount(self.cells, minlength=self.shape[0] * self.shape[1])
        total = np.bincount(self.cells, weights=values[self.tiles], minlength=len(count))
        plane = np.full(len(count), np.nan, dtype=np.float32)
        np.divide(total, count, out=plane, where=count > 0, casting="same_kind")
        return plane.reshape(self.shape)

    def cover(self, chosen: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """Return the cells (h, w) that a chosen tile (n,) covers."""
        plane = np.zeros(self.shape[0] * self.shape[1], dtype=bool)
        plane[self.cells[chosen[self.tiles]]] = True
        return plane.reshape(self.shape)

    def edges_um(self, plane: NDArray[np.bool_]) -> Points:
        """Return the border of the true cells as segments (m, 4): x0, y0, x1, y1 in µm, y downwards."""
        padded = np.pad(plane, 1)
        rows, columns = np.nonzero(padded[1:, 1:-1] != padded[:-1, 1:-1])
        flat = np.stack([columns, rows, columns + 1, rows], axis=1)
        rows, columns = np.nonzero(padded[1:-1, 1:] != padded[1:-1, :-1])
        upright = np.stack([columns, rows, columns, rows + 1], axis=1)
        return np.asarray(np.concatenate([flat, upright]) * self.cell_um + np.tile(self.origin_um, 2))


def make_lattice(grid: TileGrid) -> Lattice:
    """Return the cells of a grid with at least one tile."""
    tiling = grid.tiling
    step_um = (tiling.patch_size - tiling.overlap) * grid.delivered_mpp
    width_um, height_um = (side * grid.slide_mpp for side in grid.slide_size_px0)
    cell_um = step_um if _is_regular(grid, step_um) else grid.tile_px0 * grid.slide_mpp / 4
    cell_um = max(cell_um, float(np.sqrt(width_um * height_um / MAX_CELLS)))
    boxes, tiles = raster_boxes(grid, cell_um)
    corner, end = boxes[:, :2].min(axis=0), boxes[:, 2:].max(axis=0)
    shape = int(end[1] - corner[1]), int(end[0] - corner[0])
    cells, owners = _cells_of(boxes - np.tile(corner, 2), tiles, shape[1])
    return Lattice(shape, (float(corner[0] * cell_um), float(corner[1] * cell_um)), cell_um, cells, owners)


def _is_regular(grid: TileGrid, step_um: float) -> bool:
    """Whether every tile lies on the multiples of the step; raster cells then are exact."""
    height, width = raster_shape(grid, step_um)
    places = grid.origins_px0 * grid.slide_mpp / step_um
    is_near = np.abs(places - places.round()).max() * step_um <= 1.01 * grid.slide_mpp
    return bool(is_near) and height * width <= MAX_CELLS


def _cells_of(boxes: Indices, tiles: Indices, width: int) -> tuple[Indices, Indices]:
    """Return each cell of each box (in cells, half open), with the box's tile."""
    across, down = (boxes[:, 2:] - boxes[:, :2]).T
    per_box = across * down
    box = np.repeat(np.arange(len(boxes)), per_box)
    within = np.arange(len(box)) - np.repeat(np.cumsum(per_box) - per_box, per_box)
    rows, columns = boxes[box, 1] + within // across[box], boxes[box, 0] + within % across[box]
    return np.asarray(rows * width + columns, dtype=np.int64), np.asarray(tiles[box], dtype=np.int64)


def centres_px0(grid: TileGrid) -> Points:
    """Return the tiles' centres (n, 2)."""
    return np.asarray(grid.origins_px0 + grid.tile_px0 / 2)


def area_in_outline(grid: TileGrid, outline_px0: Points) -> shapely.Geometry:
    """Return what a drawn outline (m, 2) surrounds, to a twentieth of a tile; it may cross itself."""
    if len(outline_px0) < 3 or not np.isfinite(outline_px0).all():
        return shapely.Polygon()
    corners = outline_px0.round(3)  # coordinates below any screen's pixel make geometry fail
    return shapely.make_valid(shapely.simplify(shapely.Polygon(corners), grid.tile_px0 / 20))


def area_under_stroke(grid: TileGrid, stroke_px0: Points, *, width_tiles: float) -> shapely.Geometry:
    """Return the area of a brush stroke (m, 2) that is `width_tiles` tiles wide."""
    if not len(stroke_px0) or not np.isfinite(stroke_px0).all():
        return shapely.Polygon()
    points = stroke_px0.round(3)
    line = shapely.LineString(np.repeat(points, 2, axis=0) if len(points) == 1 else points)
    return shapely.buffer(shapely.simplify(line, grid.tile_px0 / 20), width_tiles * grid.tile_px0 / 2)


def tiles_within(grid: TileGrid, area: shapely.Geometry) -> Indices:
    """Return the tiles whose centre lies in an area, level-0 pixels."""
    if area.is_empty:
        return np.zeros(0, dtype=np.int64)
    centres = centres_px0(grid)
    x0, y0, x1, y1 = area.bounds
    near = np.flatnonzero(((centres >= (x0, y0)) & (centres <= (x1, y1))).all(axis=1))
    shapely.prepare(area)
    return np.asarray(near[shapely.contains_xy(area, *centres[near].T)], dtype=np.int64)
