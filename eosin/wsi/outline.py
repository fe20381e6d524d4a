"""Masks to polygons and back."""

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from shapely import LinearRing, MultiPolygon, Polygon, affinity, box, make_valid
from shapely.geometry.base import BaseGeometry
from skimage.draw import polygon
from skimage.measure import find_contours


def trace_outline(
    mask: NDArray[np.bool_], px0_per_cell: tuple[float, float], slide_size_px0: tuple[int, int]
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

    Returns
    -------
    MultiPolygon
        One polygon per piece, holes included, simplified by less than half a cell.
    """
    labels, _ = ndimage.label(mask)
    pieces = [
        _trace_piece(labels[where] == number, origin_cells=(where[1].start, where[0].start))
        for number, where in enumerate(ndimage.find_objects(labels), start=1)
    ]
    width, height = px0_per_cell
    outline = MultiPolygon([part for piece in pieces for part in polygons_of(piece)])
    scaled = affinity.scale(outline, width, height, origin=(0, 0))
    inside = make_valid(scaled).intersection(box(0, 0, *slide_size_px0))
    return MultiPolygon(polygons_of(inside))


def _trace_piece(piece: NDArray[np.bool_], origin_cells: tuple[int, int]) -> BaseGeometry:
    rings: list[NDArray[np.float64]] = find_contours(np.pad(piece, 1).astype(np.float32), 0.5, fully_connected="low")  # type: ignore[no-untyped-call]
    x0, y0 = origin_cells
    # pixel (0, 0) of the padded piece has its centre half a cell outside the piece
    points = [ring[:, ::-1] - 0.5 + (x0, y0) for ring in rings if len(ring) >= 4]
    shapes = sorted((Polygon(ring) for ring in points), key=lambda shape: shape.area, reverse=True)
    if not shapes:
        return MultiPolygon()
    whole = Polygon(shapes[0].exterior, [hole.exterior for hole in shapes[1:]])
    return make_valid(whole.simplify(0.4))


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
        inside = _cells_in(piece.exterior, px0_per_cell, shape)
        for hole in piece.interiors:
            inside &= ~_cells_in(hole, px0_per_cell, shape)
        mask |= inside
    return mask


def _cells_in(ring: LinearRing, px0_per_cell: tuple[float, float], shape: tuple[int, int]) -> NDArray[np.bool_]:
    inside = np.zeros(shape, bool)
    x, y = (np.asarray(ring.coords)[:, :2] / px0_per_cell - 0.5).T
    rows, columns = polygon(y, x, shape)  # type: ignore[no-untyped-call]
    inside[rows, columns] = True
    return inside
