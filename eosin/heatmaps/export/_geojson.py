"""Tiles as QuPath objects: drag the file onto the image, then Measure ▸ Show measurement maps.

QuPath shows the box of ``openslide.bounds-*`` as the image when a slide has one, so coordinates are shifted by it.
The rules are those of QuPath 0.5 to 0.8 (``qupath.lib.io.QuPathTypeAdapters``).
"""

import json
import math
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from eosin._files import write_file
from eosin._seals import LARGE_JSON_BYTES, LARGE_JSON_VALUES, read_json
from eosin.heatmaps._colour import ColourScale, scale_of
from eosin.heatmaps._heatmap import Heatmap

NAMESPACE = uuid.uuid5(uuid.NAMESPACE_URL, "eosin:tile")
CLASSES = 10
OBJECT_TYPES = frozenset({"annotation", "detection", "tile", "cell", "tmaCore", "root"})


def write_geojson(
    path: Path,
    heatmaps: Sequence[Heatmap],
    *,
    slide_id: str,
    bounds_px0: tuple[int, int, int, int] | None = None,
    scale: ColourScale | None = None,
    top: int | None = None,
) -> None:
    """Write one tile object per tile with a measurement for every map.

    Parameters
    ----------
    path : Path
    heatmaps : sequence of Heatmap
        All on one grid. The first gives the classification: ten classes along the colour scale, with its colours.
    slide_id : str
        Part of the objects' UUIDs, which are the same every time the file is written.
    bounds_px0 : tuple of int, optional
        x, y, w, h of the box that QuPath shows as the image; its corner becomes (0, 0), tiles are clipped to it.
    scale : ColourScale, optional
        `scale_of` the first map unless given.
    top : int, optional
        Only the tiles with the highest values of the first map, for slides with very many.

    Raises
    ------
    ValueError
        If there is no map, or two of them have different grids or the same kind.
    """
    _require_one_grid(heatmaps)
    features = _tile_features(heatmaps, slide_id, bounds_px0, scale or scale_of(heatmaps[0]), top)
    write_file(path, lambda file: _write_collection(file, features))


def _require_one_grid(heatmaps: Sequence[Heatmap]) -> None:
    kinds = [heatmap.kind for heatmap in heatmaps]
    if not heatmaps or len(set(kinds)) < len(kinds):
        raise ValueError(f"the maps of one file need different kinds; found {kinds}")
    if any(heatmap.grid is not heatmaps[0].grid for heatmap in heatmaps):
        raise ValueError("the maps of one file need the same grid")


def _write_collection(file: BinaryIO, features: Iterable[str]) -> None:
    file.write(b'{"type":"FeatureCollection","features":[')
    # one feature at a time: a slide of 200,000 tiles would else be held as text as a whole
    separator = "\n"
    for feature in features:
        file.write((separator + feature).encode())
        separator = ",\n"
    file.write(b"\n]}\n")


def _tile_features(
    heatmaps: Sequence[Heatmap],
    slide_id: str,
    bounds_px0: tuple[int, int, int, int] | None,
    scale: ColourScale,
    top: int | None,
) -> Iterator[str]:
    first = heatmaps[0]
    origins = first.grid.origins_px0
    boxes = _boxes_in_image(first, bounds_px0)
    classes = _classifications(scale, heatmaps[0].label)
    # a map of one value has one class
    step = (scale.high - scale.low or 1.0) / CLASSES
    bins = np.clip((first.values - scale.low) / step, 0, CLASSES - 1).astype(int)
    names = [json.dumps(heatmap.kind) for heatmap in heatmaps]
    columns = [heatmap.values for heatmap in heatmaps]
    shown = np.ones(len(boxes), bool) if top is None else _highest(first.values, top)
    # a tile outside the scanned box is clipped to nothing, which is not a polygon
    has_area = (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])
    for index in np.flatnonzero(shown & has_area).tolist():
        x0, y0, x1, y1 = boxes[index].tolist()
        measurements = ",".join(f"{name}:{column[index]:.6g}" for name, column in zip(names, columns, strict=True))
        # not random: equal results give equal files
        place = f"{slide_id}/{origins[index, 0]},{origins[index, 1]},{first.grid.tile_px0}"
        yield (
            f'{{"type":"Feature","id":"{uuid.uuid5(NAMESPACE, place)}","geometry":{{"type":"Polygon","coordinates":'
            f"[[[{x0},{y0}],[{x1},{y0}],[{x1},{y1}],[{x0},{y1}],[{x0},{y0}]]]}},"
            f'"properties":{{"objectType":"tile","classification":{classes[bins[index]]},'
            f'"measurements":{{{measurements}}}}}}}'
        )


def _boxes_in_image(heatmap: Heatmap, bounds_px0: tuple[int, int, int, int] | None) -> NDArray[np.int64]:
    x, y, width, height = bounds_px0 or (0, 0, *heatmap.grid.slide_size_px0)
    boxes = heatmap.grid.boxes_px0() - np.array([x, y, x, y])
    return np.asarray(np.clip(boxes, 0, np.array([width, height, width, height])), dtype=np.int64)


def _highest(values: NDArray[np.float64], count: int) -> NDArray[np.bool_]:
    chosen = np.zeros(len(values), dtype=bool)
    chosen[np.argsort(-values, kind="stable")[:count]] = True
    return chosen


def _classifications(scale: ColourScale, label: str) -> list[str]:
    edges = np.linspace(scale.low, scale.high, CLASSES + 1)
    colours = scale.rgb((edges[:-1] + edges[1:]) / 2).tolist()
    return [
        json.dumps({"name": f"{label} {low:.3g} to {high:.3g}", "color": colour}, ensure_ascii=False)
        for low, high, colour in zip(edges[:-1], edges[1:], colours, strict=True)
    ]


def check_geojson(path: Path, *, size_px: tuple[int, int]) -> list[dict[str, Any]]:
    """Check a file against QuPath's rules and return its features.

    Parameters
    ----------
    path : Path
    size_px : tuple of int
        Width and height of the image as QuPath opens it.

    Raises
    ------
    ValueError
        With the first rule that is broken and the feature that breaks it.
    """
    data = read_json(path, most_bytes=LARGE_JSON_BYTES, most_values=LARGE_JSON_VALUES)
    _rule(data.get("type") == "FeatureCollection" and isinstance(data.get("features"), list), "not a FeatureCollection")
    _rule("crs" not in data, "a crs is not allowed")
    features: list[dict[str, Any]] = data["features"]
    for feature in features:
        _check_feature(feature, size_px)
    _rule(len({feature["id"] for feature in features}) == len(features), "ids are not unique")
    for kind in ("tile", "detection"):
        names = {tuple(f["properties"]["measurements"]) for f in features if f["properties"]["objectType"] == kind}
        _rule(len(names) <= 1, f"{kind} objects have different measurement names")
    return features


def _rule(holds: object, fault: str) -> None:
    if not holds:
        raise ValueError(fault)


def _check_feature(feature: Mapping[str, Any], size_px: tuple[int, int]) -> None:
    where = f"feature {feature.get('id')}"
    _rule(feature.get("type") == "Feature", f"{where}: type is not Feature")
    _rule(str(uuid.UUID(feature["id"])) == feature["id"], f"{where}: id is not a UUID")
    properties = feature["properties"]
    _rule(properties.get("objectType") in OBJECT_TYPES, f"{where}: unknown objectType {properties.get('objectType')}")
    _check_classification(properties.get("classification"), where)
    measurements = properties.get("measurements", {})
    is_number = [type(value) in (int, float) and math.isfinite(value) for value in measurements.values()]
    _rule(all(is_number), f"{where}: a measurement is not a finite number")
    geometry = feature["geometry"]
    _rule(geometry["type"] in ("Polygon", "MultiPolygon"), f"{where}: geometry {geometry['type']}")
    polygons = [geometry["coordinates"]] if geometry["type"] == "Polygon" else geometry["coordinates"]
    for ring in (ring for polygon in polygons for ring in polygon):
        _check_ring(ring, size_px, where)


def _check_classification(classification: Any, where: str) -> None:
    if classification is None:
        return
    name, colour = classification.get("name"), classification.get("color")
    _rule(isinstance(name, str) and name != "", f"{where}: classification without a name")
    is_colour = isinstance(colour, list) and len(colour) == 3 and all(type(c) is int and 0 <= c <= 255 for c in colour)
    _rule(is_colour, f"{where}: classification colour {colour} is not three integers 0 to 255")


def _check_ring(ring: Sequence[Sequence[float]], size_px: tuple[int, int], where: str) -> None:
    points = np.asarray(ring, dtype=float)
    _rule(len(points) >= 4 and bool((points[0] == points[-1]).all()), f"{where}: ring is not closed")
    is_inside = bool((points >= 0).all() and (points <= np.asarray(size_px)).all())
    _rule(is_inside, f"{where}: a point lies outside the image of {size_px[0]} x {size_px[1]}")
