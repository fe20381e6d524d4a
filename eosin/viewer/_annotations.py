"""Annotations that readers draw on slides: one GeoJSON file per slide, in the form that QuPath reads and writes."""

import threading
import uuid
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import shapely
from shapely import Geometry, MultiPolygon, affinity

from eosin._files import write_json
from eosin.errors import ConfigError
from eosin.heatmaps._annotations import areas_of, name_of, stream_features
from eosin.viewer._catalogue import SlideStudy
from eosin.wsi._geojson import qupath_origin
from eosin.wsi._outline import polygons_of

FOLDER = "annotations"
MAX_BYTES = 64 * 2**20
MAX_NAME = 80
NAMELESS = "Region"
COLOURS = ("#1b6ca8", "#c2185b", "#00796b", "#6a1b9a", "#d84315", "#37474f", "#827717", "#5d4037")
Features = list[dict[str, Any]]


@dataclass(frozen=True, eq=False)
class Annotation:
    """An area with a name.

    Parameters
    ----------
    id : str
    name : str
    area : MultiPolygon
        Level-0 pixels.
    """

    id: str
    name: str
    area: MultiPolygon

    @property
    def colour(self) -> str:
        """A colour that depends on the name alone, ``#rrggbb``."""
        return COLOURS[zlib.crc32(self.name.encode()) % len(COLOURS)]

    def in_words(self, mpp: float) -> str:
        """Return the name and the size in mm²."""
        return f"{self.name} ({self.area.area * (mpp / 1000) ** 2:.3g} mm²)"


class Annotations:
    """The annotations of all slides. The files are the truth: they are read before every change.

    So objects that QuPath or another tab wrote into a file stay in it.

    Parameters
    ----------
    out : Path or None
        Gets ``annotations/<slide id>.geojson``. Without it, annotations last as long as the viewer.
    """

    def __init__(self, out: Path | None) -> None:
        self._folder = None if out is None else out / FOLDER
        self._unsaved: dict[str, Features] = {}
        self._lock = threading.Lock()

    def path(self, slide_id: str) -> Path | None:
        """Return the file of a slide."""
        return None if self._folder is None else self._folder / f"{slide_id}.geojson"

    def of(self, study: SlideStudy) -> list[Annotation]:
        """Return the annotations of a slide that have an area.

        Raises
        ------
        ConfigError
            If the file cannot be read as GeoJSON.
        """
        with self._lock:
            features = self._read(study)
        corner = qupath_origin(study.bounds_px0)
        file = Path(f"{study.listed.slide_id}.geojson")  # a browser gets no folder
        found = (_annotation(feature, corner, file) for feature in features)
        return [one for one in found if one is not None]

    def add(self, study: SlideStudy, name: str, drawn: Geometry) -> str:
        """Keep an area (level-0 pixels) under a name and return its id.

        Raises
        ------
        ConfigError
            If nothing of the area lies on the slide, or the slide's file cannot be read.
        """
        feature = _feature(study, _clean(name), drawn)
        with self._lock:
            self._write(study, [*self._read(study), feature])
        return str(feature["id"])

    def remove(self, study: SlideStudy, key: str) -> None:
        """Remove the annotation with this id.

        Raises
        ------
        ConfigError
            If the slide's file cannot be read.
        """
        with self._lock:
            self._write(study, [one for one in self._read(study) if one.get("id") != key])

    def _read(self, study: SlideStudy) -> Features:
        path = self.path(study.listed.slide_id)
        if path is None:
            return self._unsaved.get(study.listed.slide_id, [])
        if not path.exists():
            return []
        try:
            if path.stat().st_size > MAX_BYTES:
                raise ValueError(f"larger than {MAX_BYTES // 2**20} MiB")
            return list(stream_features(path))
        except (OSError, ValueError, RecursionError) as error:
            raise ConfigError(
                f"{path.name}: the annotations cannot be read ({error}); move the file away or repair it"
            ) from None

    def _write(self, study: SlideStudy, features: Features) -> None:
        path = self.path(study.listed.slide_id)
        if path is None:
            self._unsaved[study.listed.slide_id] = features
        else:
            write_json(path, {"type": "FeatureCollection", "features": features})


def _clean(name: str) -> str:
    return " ".join("".join(c if c.isprintable() else " " for c in name).split())[:MAX_NAME] or NAMELESS


def _feature(study: SlideStudy, name: str, drawn: Geometry) -> dict[str, Any]:
    """Return an annotation of QuPath, relative to the box that QuPath shows and inside it."""
    x, y, width, height = study.bounds_px0 or (0, 0, *study.grid.slide_size_px0)
    inside = shapely.make_valid(drawn).intersection(shapely.box(x, y, x + width, y + height))
    parts = polygons_of(shapely.set_precision(affinity.translate(inside, -x, -y), 0.01))
    if not parts:
        raise ConfigError("The drawing has no area on the slide.")
    colour = Annotation("", name, MultiPolygon()).colour
    return {
        "type": "Feature",
        "id": str(uuid.uuid4()),
        "geometry": shapely.geometry.mapping(parts[0] if len(parts) == 1 else MultiPolygon(parts)),
        "properties": {
            "objectType": "annotation",
            "name": name,
            "classification": {"name": name, "color": [int(colour[at : at + 2], 16) for at in (1, 3, 5)]},
            "isLocked": False,
        },
    }


def _annotation(feature: dict[str, Any], corner: tuple[int, int], path: Path) -> Annotation | None:
    if (feature.get("properties") or {}).get("objectType", "annotation") != "annotation":
        return None
    parts = [one for area in areas_of(feature, path) for one in polygons_of(area)]
    if not parts:
        return None
    area = affinity.translate(MultiPolygon(parts), *corner)
    return Annotation(str(feature.get("id", "")), name_of(feature) or NAMELESS, area)


def annotation_columns(annotations: Sequence[Annotation], mpp: float) -> dict[str, list[Any]]:
    """Return one line per ring in plot units, with its colour, and the name at the highest point of each area."""
    columns: dict[str, list[Any]] = {name: [] for name in ("xs", "ys", "colour", "x", "y", "name")}
    for one in annotations:
        for part in one.area.geoms:
            for hole, ring in enumerate((part.exterior, *part.interiors)):
                points = np.asarray(ring.coords)[:, :2] * mpp
                top = points[points[:, 1].argmin()]
                row = (points[:, 0], -points[:, 1], one.colour, top[0], -top[1], "" if hole else one.name)
                for column, value in zip(columns.values(), row, strict=True):
                    column.append(value)
    return columns


def require_apart(out: Path | None, slides: Sequence[Path]) -> None:
    """Refuse a folder for results in which slides lie.

    Raises
    ------
    ConfigError
    """
    if out is not None and any(slide.resolve().parent == out.resolve() for slide in slides):
        raise ConfigError(f"--out {out}: is the folder of the slides; pass another folder for sessions and annotations")
