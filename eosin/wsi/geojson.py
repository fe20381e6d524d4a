"""Outlines as GeoJSON that QuPath opens.

QuPath takes the bounds box of a slide, where the file states one, as the image: coordinates written for it are
relative to that box's corner.
"""

import json
import uuid
from typing import Any

from shapely import MultiPolygon, Polygon, affinity

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
    shifted = affinity.translate(outline, -qupath_origin_px0[0], -qupath_origin_px0[1])
    features = [_feature(polygon, number, slide_id) for number, polygon in enumerate(shifted.geoms)]
    return json.dumps({"type": "FeatureCollection", "features": features}, allow_nan=False)


def _feature(polygon: Polygon, number: int, slide_id: str) -> dict[str, Any]:
    rings = [polygon.exterior, *polygon.interiors]
    return {
        "type": "Feature",
        "id": str(uuid.uuid5(_IDS, f"{slide_id}/{number}")),
        "geometry": {"type": "Polygon", "coordinates": [_ring(list(ring.coords)) for ring in rings]},
        "properties": {
            "objectType": "annotation",
            "classification": {"name": "Tissue", "color": list(TISSUE_COLOUR)},
            "isLocked": False,
            "tissue_id": number,
        },
    }


def _ring(points: list[tuple[float, ...]]) -> list[list[float]]:
    return [[round(x, 2), round(y, 2)] for x, y, *_ in points]


def qupath_origin(bounds_px0: tuple[int, int, int, int] | None) -> tuple[int, int]:
    """Return where QuPath has its (0, 0) on a slide with these bounds."""
    return (bounds_px0[0], bounds_px0[1]) if bounds_px0 else (0, 0)
