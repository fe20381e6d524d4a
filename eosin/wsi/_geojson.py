"""Outlines as GeoJSON that QuPath opens, and the way back.

QuPath takes the bounds box of a slide, where the file states one, as the image: coordinates written for it are
relative to that box's corner.
"""

import json
import math
import multiprocessing
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from shapely import LinearRing, MultiPolygon, Polygon, affinity, get_coordinates, make_valid, union_all
from shapely.errors import ShapelyError
from shapely.geometry import shape

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
        parts = list(_annotations(read_json(path)))
        n_points = sum(_count_points(geometry) for geometry, _ in parts)
        if n_points > FEW_POINTS and not multiprocessing.current_process().daemon:
            outline = call_apart(_unite, parts, timeout_s=UNITE_S, most_bytes=UNITE_BYTES)
        else:
            outline = _unite(parts)
    except WorkerError as error:
        message = f"uniting its {n_points:,} points failed: the process {error.message}; simplify the outline"
        raise SlideError(path, message, code="bad-contours") from None
    except (OSError, ValueError, TypeError, KeyError, AttributeError, ShapelyError) as error:
        raise SlideError(path, f"the outline cannot be read: {error}", code="bad-contours") from error
    if parts and outline is None:
        raise SlideError(path, "the outline has no annotation with an area", code="bad-contours")
    return affinity.translate(outline or MultiPolygon(), *qupath_origin_px0)


def _unite(parts: Sequence[tuple[dict[str, Any], bool]]) -> MultiPolygon | None:
    """Return what is wanted without what is cut out; None where nothing has an area.

    Edges may cross each other as often as the square of their number: of many, in a process with limits.
    """
    areas = [(_area_of(geometry), ignored) for geometry, ignored in parts]
    if not any(polygons for polygons, _ in areas):
        return None
    wanted = union_all([polygon for polygons, ignored in areas if not ignored for polygon in polygons])
    cut = union_all([polygon for polygons, ignored in areas if ignored for polygon in polygons])
    return MultiPolygon(polygons_of(wanted.difference(cut)))


def _count_points(part: Any) -> int:
    """Return how many points a geometry, or a list in it, has."""
    if isinstance(part, dict):
        return sum(map(_count_points, part.values()))
    if not isinstance(part, list) or not part:
        return 0
    return sum(map(_count_points, part)) if isinstance(part[0], list | dict) else 1


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


def _area_of(geometry: dict[str, Any]) -> list[Polygon]:
    drawn = shape(geometry)
    if not all(math.isfinite(value) for value in drawn.bounds) and not drawn.is_empty:
        raise ValueError("a coordinate is not finite")
    return polygons_of(make_valid(drawn))
