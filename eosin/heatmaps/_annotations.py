"""Regions that people draw: GeoJSON of QuPath in, tiles out.

A file of any size is read feature by feature, in the memory of one feature. Python's JSON decoder wants the whole text:
here the text is read in chunks, the wrapping that QuPath and others write (FeatureCollection, list, one feature, bare
geometry) is walked by hand, and the decoder is given single values only.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import shapely
from numpy.typing import NDArray
from shapely import MultiPolygon, affinity
from shapely.errors import GEOSException
from shapely.geometry.base import BaseGeometry

from eosin.errors import ConfigError
from eosin.wsi._geojson import unite
from eosin.wsi._grid import TileGrid

MAX_BYTES = 2 * 2**30
MAX_AREAS = 100_000
MAX_POINTS = 5_000_000
MAX_LEVELS = 64
MAX_NAMES = 20
CHUNK = 2**20
MAX_VALUE = 64 * 2**20
MAX_VALUES = 3_000_000
BLANK = " \t\r\n"


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
        If the file is missing, larger than 2 GiB, no GeoJSON, or a class does not occur in it; if it has more than
        100,000 areas or 5 million points to choose from, as exports of all cells or tiles have.

    Notes
    -----
    The file is read feature by feature: memory is that of the areas that are chosen.
    """
    chosen, names = _chosen_areas(path, classes)
    missing = [name for name in classes if name not in names]
    if missing:
        known = ", ".join(sorted(name for name in names if name)[:MAX_NAMES]) or "no names"
        raise ConfigError(f"{path}: has no region named {', '.join(missing)}; it has {known}")
    try:
        union = unite(chosen) or MultiPolygon()
    except (ValueError, GEOSException) as error:
        raise ConfigError(f"{path}: cannot be read as GeoJSON ({error})") from None
    x, y = (0, 0) if bounds_px0 is None else bounds_px0[:2]
    return affinity.translate(union, x, y)


def _chosen_areas(path: Path, classes: Sequence[str]) -> tuple[list[BaseGeometry], set[str]]:
    """Return the areas of the classes, and the names of all features."""
    chosen: list[BaseGeometry] = []
    names: set[str] = set()
    points = 0
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ConfigError(f"{path}: is larger than {MAX_BYTES // 2**30} GiB; export the annotations alone")
        if not classes:
            _require_few(path)
        for feature in stream_features(path):
            name = name_of(feature)
            names.add(name)
            if not classes or name in classes:
                areas = areas_of(feature, path)
                chosen += areas
                points += sum(shapely.get_num_coordinates(area) for area in areas)
            if len(chosen) > MAX_AREAS or points > MAX_POINTS:
                raise _too_many(path)
    except RecursionError:
        raise ConfigError(
            f"{path}: cannot be read as GeoJSON (it has more levels than {MAX_LEVELS}, the limit)"
        ) from None
    except (OSError, ValueError, OverflowError, AttributeError, TypeError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{path}: cannot be read as GeoJSON ({error})") from None
    return chosen, names


def _require_few(path: Path) -> None:
    """Count areas and brackets, one of which each point has: a hundred times faster than to parse them."""
    areas = brackets = 0
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            areas += chunk.count(b'olygon"')
            brackets += chunk.count(b"[")
            if areas > MAX_AREAS or brackets > MAX_POINTS + 4 * MAX_AREAS:
                raise _too_many(path)


def _too_many(path: Path) -> ConfigError:
    return ConfigError(
        f"{path}: has more than {MAX_AREAS} areas or {MAX_POINTS} points; export the annotations without cells and "
        "tiles, or choose a class that outlines regions"
    )


def name_of(feature: Mapping[str, Any]) -> str:
    """Return the class of a feature, or its name where it has no class; empty without both."""
    properties = feature.get("properties") or {}
    classification = properties.get("classification")
    if isinstance(classification, dict):
        classification = classification.get("name") or ": ".join(classification.get("names", []))
    return str(classification or properties.get("name") or "")


def areas_of(feature: Mapping[str, Any], path: Path) -> list[BaseGeometry]:
    """Return the polygons of a feature, none for points and lines; `path` is named where they are damaged."""
    geometry = feature.get("geometry") or {}
    if geometry.get("type") not in ("Polygon", "MultiPolygon"):
        return []
    try:
        drawn = shapely.geometry.shape(geometry)
    except (GEOSException, ValueError, TypeError, KeyError, IndexError, OverflowError) as error:
        name = name_of(feature) or feature.get("id", "")
        raise ConfigError(f"{path}: region {name!r} is damaged ({error})") from None
    return list(drawn.geoms) if isinstance(drawn, MultiPolygon) else [drawn]


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
            "pass the annotation of this slide, drawn at its full size"
        )
    # prepared geometry answers many intersections from one index
    shapely.prepare(region)
    boxes = shapely.box(*grid.boxes_px0().T)
    touched = np.flatnonzero(shapely.intersects(region, boxes))
    area = shapely.area(shapely.intersection(region, boxes[touched]))
    return np.asarray(touched[area >= share * grid.tile_px0**2 - 1e-6], dtype=np.int64)


def stream_features(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the features of a GeoJSON file.

    Raises
    ------
    OSError, ValueError, RecursionError
        If the file cannot be read, is not valid JSON, is not GeoJSON, or one feature is larger than 64 MiB.
    """
    with path.open(encoding="utf-8-sig") as file:
        text = _Text(file.read)
        if text.peek() == "[":
            yield from _list(text)
        elif text.peek() == "{":
            yield from _object(text)
        else:
            raise ValueError("is JSON but no GeoJSON (no FeatureCollection, Feature or geometry)")
        if text.peek():
            raise ValueError("has text after the end of its JSON")


class _Text:
    """A text that is read as far as it is needed."""

    def __init__(self, read: Any) -> None:
        self._read = read
        self._buffer = ""
        self._place = 0
        self._decode = json.JSONDecoder().raw_decode

    def peek(self) -> str:
        """Return the next character that is not blank, or nothing at the end."""
        while True:
            while self._place < len(self._buffer):
                if self._buffer[self._place] not in BLANK:
                    return self._buffer[self._place]
                self._place += 1
            if not self._more(CHUNK):
                return ""

    def take(self, expected: str) -> None:
        """Step over a character."""
        found = self.peek()
        if found != expected:
            raise ValueError(f"expected {expected!r}, found {found or 'the end of the file'!r}")
        self._place += 1

    def value(self) -> Any:
        """Decode one whole value; the part that is read doubles until it holds the value."""
        self.peek()
        wanted = CHUNK
        while True:
            if wanted > CHUNK and sum(map(self._buffer.count, ",[{")) > MAX_VALUES:  # one chunk holds fewer
                raise ValueError(f"has a feature that may hold more than {MAX_VALUES:,} values, the limit")
            try:
                value, end = self._decode(self._buffer, self._place)
            except ValueError:
                if len(self._buffer) - self._place > MAX_VALUE:
                    raise ValueError(f"has a feature larger than {MAX_VALUE // 2**20} MiB") from None
                if not self._more(wanted):
                    raise
                wanted *= 2
                continue
            # "12" at the end of a chunk may be the beginning of "123"
            if end == len(self._buffer) and self._more(CHUNK):
                continue  # a number may go on
            self._place = end
            return value

    def _more(self, size: int) -> bool:
        part = self._read(size)
        self._buffer = self._buffer[self._place :] + part
        self._place = 0
        return bool(part)


def _list(text: _Text) -> Iterator[dict[str, Any]]:
    text.take("[")
    while text.peek() != "]":
        yield from _features_of(text.value())
        if text.peek() != "]":
            text.take(",")
    text.take("]")


def _object(text: _Text) -> Iterator[dict[str, Any]]:
    """Walk the members of the outermost object; features may come before or after the type."""
    members: dict[str, Any] = {}
    has_features = False
    text.take("{")
    while text.peek() != "}":
        key = text.value()
        text.take(":")
        if key == "features" and text.peek() == "[":
            has_features = True
            yield from _list(text)
        else:
            members[key] = text.value()
        if text.peek() != "}":
            text.take(",")
    text.take("}")
    if not has_features:
        yield from _features_of(members)


def _features_of(item: Any) -> Iterator[dict[str, Any]]:
    if isinstance(item, list):
        for part in item:
            yield from _features_of(part)
        return
    kind = item.get("type") if isinstance(item, dict) else None
    if kind == "Feature":
        yield item
    elif kind == "FeatureCollection":
        features = item.get("features") or []
        if not isinstance(features, list):
            raise ValueError("its features are not a list")
        yield from _features_of(features)
    elif isinstance(item, dict) and "coordinates" in item:
        yield {"type": "Feature", "geometry": item, "properties": {}}
    else:
        raise ValueError("is JSON but no GeoJSON (no FeatureCollection, Feature or geometry)")
