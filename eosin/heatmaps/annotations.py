"""Regions that people draw: GeoJSON of QuPath in, tiles out."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import shapely
from numpy.typing import NDArray
from shapely import MultiPolygon, affinity
from shapely.errors import GEOSException

from eosin.errors import ConfigError
from eosin.wsi.grid import TileGrid
from eosin.wsi.outline import polygons_of

MAX_BYTES = 512 * 2**20


def read_regions(
    path: Path, *, bounds_px0: tuple[int, int, int, int] | None = None, classes: Sequence[str] = ()
) -> MultiPolygon:
    """Read the areas of a GeoJSON file.

    Parameters
    ----------
    path : Path
        FeatureCollection, list of features, one feature or a bare geometry. Points and lines have no area and are
        left out; areas that cross themselves are repaired.
    bounds_px0 : tuple of int, optional
        x, y, w, h of the box that QuPath shows as the image; added to the coordinates.
    classes : sequence of str
        Take only features with one of these classifications or names; all unless given.

    Returns
    -------
    MultiPolygon
        Their union in level-0 pixels; empty when the file has no area.

    Raises
    ------
    ConfigError
        If the file is missing, larger than 512 MiB, no GeoJSON, or a class does not occur in it.
    """
    features = list(_features(_read_json(path), path))
    names = {_name(feature) for feature in features}
    missing = [name for name in classes if name not in names]
    if missing:
        known = ", ".join(sorted(name for name in names if name)) or "no names"
        raise ConfigError(f"{path}: no region is called {', '.join(missing)}; the file has {known}")
    chosen = [feature for feature in features if not classes or _name(feature) in classes]
    union = shapely.union_all([polygon for feature in chosen for polygon in _polygons(feature, path)])
    x, y = (0, 0) if bounds_px0 is None else bounds_px0[:2]
    return MultiPolygon(polygons_of(affinity.translate(union, x, y)))


def _read_json(path: Path) -> Any:
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ConfigError(f"{path}: larger than 512 MiB; export the annotations without detections")
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: cannot be read as GeoJSON ({error})") from None


def _features(data: Any, path: Path) -> Iterator[Mapping[str, Any]]:
    if isinstance(data, list):
        for item in data:
            yield from _features(item, path)
    elif isinstance(data, dict) and data.get("type") == "FeatureCollection":
        yield from _features(data.get("features", []), path)
    elif isinstance(data, dict) and data.get("type") == "Feature":
        yield data
    elif isinstance(data, dict) and "coordinates" in data:
        yield {"type": "Feature", "geometry": data, "properties": {}}
    else:
        raise ConfigError(f"{path}: is JSON but no GeoJSON (no FeatureCollection, Feature or geometry)")


def _name(feature: Mapping[str, Any]) -> str:
    properties = feature.get("properties") or {}
    classification = properties.get("classification")
    if isinstance(classification, dict):
        classification = classification.get("name") or ": ".join(classification.get("names", []))
    return str(classification or properties.get("name") or "")


def _polygons(feature: Mapping[str, Any], path: Path) -> list[shapely.Polygon]:
    geometry = feature.get("geometry") or {}
    if geometry.get("type") not in ("Polygon", "MultiPolygon"):
        return []
    try:
        shape = shapely.make_valid(shapely.geometry.shape(geometry))
    except (GEOSException, ValueError, TypeError, KeyError, IndexError) as error:
        raise ConfigError(f"{path}: region {_name(feature) or feature.get('id', '')!r} is damaged ({error})") from None
    return polygons_of(shape)


def tiles_inside(grid: TileGrid, region: MultiPolygon, *, share: float = 0.5) -> NDArray[np.int64]:
    """Return the tiles of which at least `share` of the area lies in a region.

    Raises
    ------
    ConfigError
        If the region does not touch the slide at all.
    """
    width, height = grid.slide_size_px0
    if not region.is_empty and not region.intersects(shapely.box(0, 0, width, height)):
        x0, y0, x1, y1 = (round(value) for value in region.bounds)
        raise ConfigError(
            f"the region spans x {x0} to {x1}, y {y0} to {y1} and lies outside the slide of {width} x {height} pixels; "
            "is it of another slide, or drawn on a picture of another size?"
        )
    shapely.prepare(region)
    boxes = shapely.box(*grid.boxes_px0().T)
    touched = np.flatnonzero(shapely.intersects(region, boxes))
    area = shapely.area(shapely.intersection(region, boxes[touched]))
    return np.asarray(touched[area >= share * grid.tile_px0**2 - 1e-6], dtype=np.int64)
