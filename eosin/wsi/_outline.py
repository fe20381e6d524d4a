"""Masks to polygons and back."""

from collections import defaultdict
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray
from shapely import LinearRing, MultiPolygon, Polygon, box, linearrings, make_valid, simplify
from shapely.geometry.base import BaseGeometry

from eosin.wsi._morphology import window_of
from eosin.wsi._pieces import find_pieces


def trace_outline(
    mask: NDArray[np.bool_],
    px0_per_cell: tuple[float, float],
    slide_size_px0: tuple[int, int],
    *,
    window: tuple[slice, slice] | None = None,
) -> MultiPolygon:
    """Return the outline of the true cells in level-0 pixels.

    Parameters
    ----------
    mask : (h, w) bool
        Cells; the first starts at the slide's corner.
    px0_per_cell : tuple of float
        Width and height of a cell.
    slide_size_px0 : tuple of int
        The outline is cut to the slide.
    window : tuple of slice, optional
        Rows and columns that hold all true cells, when they are known.

    Returns
    -------
    MultiPolygon
        One polygon per piece, holes included, simplified by less than half a cell.
    """
    rows, columns = window or window_of(mask, 0)
    corner = np.array([columns.start, rows.start])
    outline = MultiPolygon(_pieces(mask[rows, columns], corner, np.asarray(px0_per_cell, np.float64)))
    width, height = slide_size_px0
    _, _, right, bottom = outline.bounds if not outline.is_empty else (0, 0, 0, 0)
    if right <= width and bottom <= height:
        return outline
    return MultiPolygon(polygons_of(make_valid(outline).intersection(box(0, 0, width, height))))


def _pieces(mask: NDArray[np.bool_], corner: NDArray[np.int64], cell_px0: NDArray[np.float64]) -> list[Polygon]:
    """Return a polygon for each piece, its holes cut out; `corner` is x and y of the first cell."""
    cells, sides, rings = _follow(mask)
    if not rings:
        return []
    points = ((_middles(cells, sides, mask.shape[1]) + corner) * cell_px0)[np.concatenate(rings)]
    lengths = np.array([len(ring) for ring in rings])
    pieces = find_pieces(mask)
    row, column = np.divmod(cells[[ring[0] for ring in rings]], mask.shape[1])
    owners = pieces.labels[np.searchsorted(pieces.starts, row * pieces.pitch + column, "right") - 1]
    traced = linearrings(points, indices=np.repeat(np.arange(len(rings)), lengths))
    whole = simplify(traced, 0.4 * cell_px0.min(), preserve_topology=False)  # what crosses itself is mended below
    is_hole = _areas(points, lengths) < 0
    holes: defaultdict[int, list[LinearRing]] = defaultdict(list)
    for ring, owner in zip(whole[is_hole], owners[is_hole].tolist(), strict=True):
        holes[owner].append(ring)
    outer = zip(whole[~is_hole], owners[~is_hole].tolist(), strict=True)
    found = [Polygon(ring, holes[owner]) for ring, owner in outer]
    return [part for piece in found for part in polygons_of(piece if piece.is_valid else make_valid(piece))]


def _follow(mask: NDArray[np.bool_]) -> tuple[NDArray[np.int64], NDArray[np.int64], list[list[int]]]:
    """Return cell and side of every edge between tissue and glass, and the closed rings that they make.

    Sides count from the top, clockwise.
    Edges are followed with the tissue on the right; where two cells meet by a corner only, each keeps to itself.
    """
    around = np.pad(mask, 1)
    flat, pitch, width = around.ravel(), around.shape[1], mask.shape[1]
    inner = around[:-2, 1:-1] & around[2:, 1:-1] & around[1:-1, :-2] & around[1:-1, 2:]
    rim = np.flatnonzero(mask & ~inner)
    rim = (rim // width + 1) * pitch + rim % width + 1
    outward, onward = np.array([-pitch, 1, pitch, -1]), np.array([1, pitch, -1, -pitch])
    edges = [rim[~flat[rim + step]] for step in outward.tolist()]
    first = np.cumsum([0, *(len(some) for some in edges)])
    place, sides = np.concatenate(edges), np.repeat(np.arange(4), [len(some) for some in edges])
    step, out = onward[sides], outward[sides]
    ahead, corner = flat[place + step], flat[place + step + out]
    side = np.where(~ahead, (sides + 1) % 4, np.where(~corner, sides, (sides + 3) % 4))
    target = place + np.where(ahead, step, 0) + np.where(ahead & corner, out, 0)
    following = np.empty(len(place), np.int64)
    for number, some in enumerate(edges):
        mine = side == number
        following[mine] = first[number] + np.searchsorted(some, target[mine])
    cells = (place // pitch - 1) * width + place % pitch - 1
    return cells, sides, _rings(following.tolist())


def _rings(following: list[int]) -> list[list[int]]:
    rings = []
    seen = bytearray(len(following))
    for start in range(len(following)):
        ring = []
        edge = start
        while not seen[edge]:
            seen[edge] = 1
            ring.append(edge)
            edge = following[edge]
        if ring:
            rings.append(ring)
    return rings


def _middles(cells: NDArray[np.int64], sides: NDArray[np.int64], width: int) -> NDArray[np.float64]:
    """Return x and y of the middles of the edges, in cells, (n, 2)."""
    row, column = np.divmod(cells, width)
    x = column + np.array([0.5, 1.0, 0.5, 0.0])[sides]
    y = row + np.array([0.0, 0.5, 1.0, 0.5])[sides]
    return np.stack([x, y], axis=1)


def _areas(points: NDArray[np.float64], lengths: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return the signed areas of rings; y grows downwards, so what lies to the right of its outline is positive."""
    last = np.cumsum(lengths) - 1
    after = np.arange(1, len(points) + 1)
    after[last] = last - lengths + 1
    (x, y), (to_x, to_y) = points.T, points[after].T
    return np.asarray(np.add.reduceat(x * to_y - to_x * y, last - lengths + 1) / 2)


def polygons_of(shape: BaseGeometry) -> list[Polygon]:
    """Return the polygons with an area among the parts of any shape."""
    if isinstance(shape, Polygon):
        return [shape] if shape.area > 0 else []
    return [piece for part in getattr(shape, "geoms", ()) for piece in polygons_of(part)]


def fill_outline(outline: MultiPolygon, px0_per_cell: tuple[float, float], shape: tuple[int, int]) -> NDArray[np.bool_]:
    """Return the mask of the cells whose centre lies in the outline: the way back from `trace_outline`.

    Parameters
    ----------
    outline : MultiPolygon
        Level-0 pixels.
    px0_per_cell : tuple of float
        Width and height of a cell.
    shape : tuple of int
        Height and width of the mask.

    Returns
    -------
    (h, w) bool
    """
    mask = np.zeros(shape, bool)
    for piece in polygons_of(outline):
        mask |= _cells_in((piece.exterior, *piece.interiors), px0_per_cell, shape)
    return mask


def _cells_in(
    rings: Iterable[LinearRing], px0_per_cell: tuple[float, float], shape: tuple[int, int]
) -> NDArray[np.bool_]:
    """Fill by parity: a cell is inside when the rings cross its row an odd number of times left of its centre.

    Every edge gives one crossing per row that it spans, so the cost is that of the drawn line and of the mask, however
    many corners there are.
    """
    height, width = shape
    crossings = np.zeros((height, width + 1), np.uint8)
    for ring in rings:
        x, y = (np.asarray(ring.coords)[:, :2] / px0_per_cell - 0.5).T
        low, high = np.minimum(y[:-1], y[1:]), np.maximum(y[:-1], y[1:])
        first, end = (np.clip(np.ceil(at), 0, height).astype(np.int64) for at in (low, high))
        spans = end - first
        edge = np.repeat(np.arange(len(spans)), spans)
        row = np.arange(len(edge)) - np.repeat(np.cumsum(spans) - spans - first, spans)
        slope = (x[edge + 1] - x[edge]) / (y[edge + 1] - y[edge])
        column = np.clip(np.ceil(x[edge] + (row - y[edge]) * slope), 0, width).astype(np.int64)
        np.add.at(crossings, (row, column), 1)  # wraps at 256, which is even
    return np.bitwise_xor.accumulate(crossings & 1, axis=1)[:, :width].astype(bool)
