"""Outlines as GeoJSON that QuPath opens, and the way back.

QuPath takes the bounds box of a slide, where the file states one, as the image: coordinates written for it are
relative to that box's corner.
"""

import json
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from shapely import (
    LinearRing,
    MultiPolygon,
    Polygon,
    affinity,
    get_coordinates,
    get_num_coordinates,
    make_valid,
    union_all,
)
from shapely.errors import ShapelyError
from shapely.geometry import shape
from shapely.geometry.base import BaseGeometry

from eosin._processes import call_apart
from eosin._seals import read_json
from eosin.errors import SlideError, WorkerError
from eosin.wsi._outline import polygons_of

FEW_POINTS = 1000
UNITE_S = 60.0
UNITE_BYTES = 2 * 2**30
TISSUE_COLOUR = (0, 160, 70)
_IDS = uuid.UUID("8f8e9c1e-6f0b-5d7d-9a51-3f2f6f1f7a10")


def outline_to_geojson(outline: MultiPolygon, *, slide_id: str, qupath_origin_px0: tuple[int, int] = (0, 0)) -> str:
    """Return a FeatureCollection with one annotation per piece of tissue.

    Parameters
    ----------
    outline : MultiPolygon
        Level-0 pixels.
    slide_id : str
        Makes the ids of the objects, so that equal outlines give equal files.
    qupath_origin_px0 : tuple of int
        Corner of the slide's bounds box.
    """
    origin = np.asarray(qupath_origin_px0)
    features = [_feature(polygon, number, slide_id, origin) for number, polygon in enumerate(outline.geoms)]
    return json.dumps({"type": "FeatureCollection", "features": features}, allow_nan=False)


def _feature(polygon: Polygon, number: int, slide_id: str, origin: NDArray[np.int64]) -> dict[str, Any]:
    rings = [polygon.exterior, *polygon.interiors]
    return {
        "type": "Feature",
        "id": str(uuid.uuid5(_IDS, f"{slide_id}/{number}")),
        "geometry": {"type": "Polygon", "coordinates": [_ring(ring, origin) for ring in rings]},
        "properties": {
            "objectType": "annotation",
            "classification": {"name": "Tissue", "color": list(TISSUE_COLOUR)},
            "isLocked": False,
            "tissue_id": number,
        },
    }


def _ring(ring: LinearRing, origin: NDArray[np.int64]) -> list[list[float]]:
    points: list[list[float]] = np.round(get_coordinates(ring) - origin, 2).tolist()
    return points


def qupath_origin(bounds_px0: tuple[int, int, int, int] | None) -> tuple[int, int]:
    """Return where QuPath has its (0, 0) on a slide with these bounds."""
    return (bounds_px0[0], bounds_px0[1]) if bounds_px0 else (0, 0)


def read_outline(path: Path, *, qupath_origin_px0: tuple[int, int] = (0, 0)) -> MultiPolygon:
    """Read an outline that a person drew or edited in QuPath.

    Everything that QuPath itself accepts: a FeatureCollection, a list of features, one feature, a bare geometry.
    Annotations with an area are united; those whose class ends with ``*`` (QuPath's sign for "ignore") are cut out;
    points, lines, detections and tiles are left aside.

    Parameters
    ----------
    path : Path
        GeoJSON file.
    qupath_origin_px0 : tuple of int
        Corner of the slide's bounds box.

    Returns
    -------
    MultiPolygon
        Level-0 pixels; empty when the file holds no object at all.

    Raises
    ------
    SlideError
        Code ``bad-contours`` if the file is not valid GeoJSON, or holds objects but none with an area.
    """
    try:
        drawn = [(shape(geometry), ignored) for geometry, ignored in _annotations(read_json(path))]
        wanted, cut = ([one for one, ignored in drawn if ignored is side] for side in (False, True))
        outline = unite(wanted, cut)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, ShapelyError) as error:
        raise SlideError(path, f"the outline cannot be read: {error}", code="bad-contours") from error
    if drawn and outline is None:
        raise SlideError(path, "the outline has no annotation with an area; draw one in QuPath", code="bad-contours")
    return affinity.translate(outline or MultiPolygon(), *qupath_origin_px0)


def unite(wanted: Sequence[BaseGeometry], cut: Sequence[BaseGeometry] = ()) -> MultiPolygon | None:
    """Return the area of what is wanted without what is cut out; None where nothing has an area.

    Edges may cross each other as often as the square of their number: many are united in a process with limits.

    Raises
    ------
    ValueError
        If a coordinate is not finite, or the crossings take too much time or memory.
    """
    everything = [*wanted, *cut]
    if not np.isfinite(get_coordinates(everything)).all():
        raise ValueError("a coordinate is not finite")
    n_points = int(get_num_coordinates(everything).sum())
    if n_points <= FEW_POINTS:
        return _unite(wanted, cut)
    try:
        return call_apart(_unite, wanted, cut, timeout_s=UNITE_S, most_bytes=UNITE_BYTES)
    except WorkerError as error:
        message = f"uniting its {n_points:,} points failed: the process {error.message}; simplify the outline"
        raise ValueError(message) from None


def _unite(wanted: Sequence[BaseGeometry], cut: Sequence[BaseGeometry]) -> MultiPolygon | None:
    areas, holes = ([one for drawn in side for one in polygons_of(make_valid(drawn))] for side in (wanted, cut))
    if not areas and not holes:
        return None
    return MultiPolygon(polygons_of(union_all(areas).difference(union_all(holes))))


def _annotations(data: Any) -> Iterator[tuple[dict[str, Any], bool]]:
    """Yield geometry and whether it is to be ignored of every annotation."""
    if isinstance(data, list):
        for item in data:
            yield from _annotations(item)
    elif data["type"] == "FeatureCollection":
        yield from _annotations(data["features"])
    elif data["type"] == "Feature":
        properties = data.get("properties") or {}
        if properties.get("objectType", "annotation") == "annotation" and data.get("geometry"):
            yield data["geometry"], _class_name(properties).endswith("*")
    else:
        yield data, False


def _class_name(properties: dict[str, Any]) -> str:
    kind = properties.get("classification")
    if isinstance(kind, dict):
        return str(kind.get("name") or ": ".join(kind.get("names") or []))
    return str(kind or "")
