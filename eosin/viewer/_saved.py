"""Sessions as files: what was taken away and added, what the model said, and regions for QuPath; and the way back."""

import uuid
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import shapely
from pydantic import BeforeValidator, Field
from shapely import MultiPolygon, affinity

from eosin import __version__
from eosin._files import write_json
from eosin._seals import KEY, is_intact, read_json, sealed
from eosin.errors import ConfigError
from eosin.options import Options
from eosin.viewer._catalogue import Catalogue, Listed, SlideStudy
from eosin.viewer._lattice import Indices
from eosin.viewer._session import Added, Edited, Verdict, in_words, judge
from eosin.wsi._geojson import qupath_origin
from eosin.wsi._grid import TileGrid
from eosin.wsi._outline import polygons_of

NAMESPACE = uuid.uuid5(uuid.NAMESPACE_URL, "eosin:viewer")
KIND = "eosin-viewer-session"
MAX_BYTES = 64 * 2**20
CLOSE = 1e-6
REMOVED_RGB, ADDED_RGB = [194, 24, 91], [0, 121, 107]
Ranges = list[tuple[Annotated[int, Field(ge=0)], Annotated[int, Field(ge=0)]]]


class SavedTiles(Options):
    """Some tiles of one slide.

    Parameters
    ----------
    slide_id : str
    slide_fingerprint : str
        Of the slide file that the features came from; empty when they do not say.
    n_tiles : int
        How many tiles the slide has.
    tiles : list of (start, stop)
        Half-open ranges of tile numbers.
    """

    slide_id: str
    slide_fingerprint: str = ""
    n_tiles: int
    tiles: Ranges


def _as_many(added: Any) -> Any:
    """Return what older versions wrote of their one donor as what is written now."""
    return added if isinstance(added, list | tuple) else () if added is None else (added,)


class SavedSession(Options):
    """One slide of a session.

    Parameters
    ----------
    kind, version
        Say what the file is.
    eosin : str
        Version that wrote it.
    model_id, aggregator : str
    class_name : str
        The class that the words are about; empty for tasks without.
    method : str
        How the numbers were made.
    removed : SavedTiles
    added : tuple of SavedTiles
        One for each donor; versions 1 and 2 have one or none.
    before, after : Verdict
    words : str
    seen : str
        What the model has seen of the slide: trained, validated, unknown, no; empty where an older version wrote it.
    """

    kind: Literal["eosin-viewer-session"]
    version: Literal[1, 2, 3]
    eosin: str
    model_id: str
    aggregator: str
    class_name: str
    method: str
    removed: SavedTiles
    added: Annotated[tuple[SavedTiles, ...], BeforeValidator(_as_many)] = ()
    before: Verdict
    after: Verdict
    words: str
    seen: str = ""


def save_session(catalogue: Catalogue, edited: Edited, class_name: str, folder: Path) -> list[Path]:
    """Write a slide's edits: the session as JSON, its regions as GeoJSON that QuPath opens.

    Parameters
    ----------
    catalogue : Catalogue
    edited : Edited
    class_name : str
    folder : Path
        Gets ``<slide id>_<number>.json`` and ``.geojson``, and for each donor ``_added.geojson``, ``_added_2.geojson``
        and so on with its tiles; earlier sessions keep their files.

    Returns
    -------
    list of Path
    """
    record = describe_session(catalogue, edited, class_name)
    stem = _free_stem(folder, edited.study.listed.slide_id)
    paths = [folder / f"{stem}.json", folder / f"{stem}.geojson"]
    write_session(paths[0], record)
    gone = np.flatnonzero(~edited.present)
    write_json(paths[1], _regions(edited.study, gone, "Removed", REMOVED_RGB))
    for number, one in enumerate(edited.added, 1):
        paths.append(folder / f"{stem}_added{'' if number == 1 else f'_{number}'}.geojson")
        write_json(paths[-1], _regions(one.donor, one.tiles, "Added", ADDED_RGB))
    return paths


def write_session(path: Path, session: SavedSession) -> None:
    """Write a session's JSON with its checksum."""
    write_json(path, sealed(session.model_dump(mode="json")))


def _free_stem(folder: Path, slide_id: str) -> str:
    number = 1
    while (folder / f"{slide_id}_{number}.json").exists():
        number += 1
    return f"{slide_id}_{number}"


def describe_session(catalogue: Catalogue, edited: Edited, class_name: str) -> SavedSession:
    """Return what `save_session` writes: the edits with the prediction before and after."""
    asked = edited.study.asked
    before = judge(asked, edited.study.seen.subsets.logits())
    after = judge(asked, edited.logits())
    return SavedSession(
        kind="eosin-viewer-session",
        version=3,
        eosin=__version__,
        model_id=asked.card.model_id,
        aggregator=asked.card.recipe.aggregator.name,
        seen="" if asked.choice is None else asked.sight.part,
        class_name=class_name,
        method=edited.study.seen.method,
        removed=_saved_tiles(edited.study, np.flatnonzero(~edited.present)),
        added=tuple(_saved_tiles(one.donor, one.tiles) for one in edited.added),
        before=before,
        after=after,
        words=in_words(catalogue, edited, before, after, class_name),
    )


def _saved_tiles(study: SlideStudy, tiles: Indices) -> SavedTiles:
    return SavedTiles(
        slide_id=study.listed.slide_id,
        slide_fingerprint=study.bag.provenance.get("input_fingerprint", ""),
        n_tiles=study.n_tiles,
        tiles=to_ranges(tiles),
    )


def to_ranges(tiles: Indices) -> list[tuple[int, int]]:
    """Return ascending numbers as half-open ranges."""
    if not len(tiles):
        return []
    breaks = np.flatnonzero(np.diff(tiles) != 1) + 1
    return [(int(part[0]), int(part[-1]) + 1) for part in np.split(tiles, breaks)]


def from_ranges(ranges: Sequence[tuple[int, int]], n_tiles: int, path: Path) -> Indices:
    """Return the numbers of half-open ranges.

    Raises
    ------
    ConfigError
        If a range does not lie among the slide's tiles.
    """
    for start, stop in ranges:
        if not 0 <= start < stop <= n_tiles:
            raise ConfigError(f"{path}: names the tiles {start} to {stop}, the slide has {n_tiles}")
    chosen = np.zeros(n_tiles, dtype=bool)
    for start, stop in ranges:
        chosen[start:stop] = True
    return np.flatnonzero(chosen)


def _regions(study: SlideStudy, tiles: Indices, name: str, rgb: list[int]) -> dict[str, Any]:
    """Return one QuPath annotation per connected region of tiles, relative to the box that QuPath shows."""
    x, y = qupath_origin(study.bounds_px0)
    area = affinity.translate(tile_area(study.grid, tiles), -x, -y)
    label = {"objectType": "annotation", "classification": {"name": name, "color": rgb}, "isLocked": False}
    features = [
        {
            "type": "Feature",
            "id": str(uuid.uuid5(NAMESPACE, f"{study.listed.slide_id}/{name}/{number}")),
            "geometry": shapely.geometry.mapping(part),
            "properties": label,
        }
        for number, part in enumerate(area.geoms)
    ]
    return {"type": "FeatureCollection", "features": features}


def tile_area(grid: TileGrid, tiles: Indices) -> MultiPolygon:
    """Return the area that tiles cover, level-0 pixels, inside the slide."""
    boxes = shapely.box(*grid.boxes_px0()[tiles].T)
    covered = shapely.union_all(boxes).intersection(shapely.box(0, 0, *grid.slide_size_px0))
    return MultiPolygon(polygons_of(covered))


def read_session(path: Path) -> SavedSession:
    """Read a session's JSON.

    Raises
    ------
    ConfigError
        If it is missing, damaged, larger than 64 MiB, or not a session.
    """
    try:
        data = read_json(path, most_bytes=MAX_BYTES)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read as a session ({error})") from None
    if not isinstance(data, dict) or data.get("kind") != KIND:
        raise ConfigError(f"{path}: not a saved session; pass a .json file that the viewer saved")
    if not is_intact(data) and (KEY in data or data.get("version") != 1):  # version 1 had no checksum
        raise ConfigError(f"{path}: is damaged or was changed by hand; save the session again")
    return SavedSession.parse({name: value for name, value in data.items() if name != KEY}, source=str(path))


def replay_session(catalogue: Catalogue, path: Path) -> SavedSession:
    """Do a saved session's edits again and return what the model says now.

    Parameters
    ----------
    catalogue : Catalogue
        With the session's model and slides.
    path : Path

    Raises
    ------
    ConfigError
        If the model, a slide or its tiles are not those of the session.
    """
    saved = read_session(path)
    model_id = catalogue.ask(saved.removed.slide_id).card.model_id
    if saved.model_id != model_id:
        raise ConfigError(
            f"{path}: was saved with the model {saved.model_id}, but --model is {model_id}; pass the same model"
        )
    study, gone = _find(catalogue, saved.removed, path)
    edited = Edited.untouched(study).act("remove", gone)
    edited = replace(edited, added=tuple(Added(*_find(catalogue, one, path)) for one in saved.added))
    if catalogue.classes and saved.class_name not in catalogue.classes:
        raise ConfigError(
            f"{path}: was saved for the class {saved.class_name!r}, which the model does not have; pass the same model"
        )
    return describe_session(catalogue, edited, saved.class_name)


def _find(catalogue: Catalogue, saved: SavedTiles, path: Path) -> tuple[SlideStudy, Indices]:
    listed = _listed(catalogue, saved.slide_id, path)
    study = catalogue.study(listed.key)
    fingerprint = study.bag.provenance.get("input_fingerprint", "")
    if study.n_tiles != saved.n_tiles or (
        fingerprint and saved.slide_fingerprint and fingerprint != saved.slide_fingerprint
    ):
        raise ConfigError(
            f"{path}: the features of {saved.slide_id} differ from those of the session; pass the same features"
        )
    return study, from_ranges(saved.tiles, study.n_tiles, path)


def _listed(catalogue: Catalogue, slide_id: str, path: Path) -> Listed:
    for listed in catalogue.listed:
        if listed.slide_id == slide_id:
            if listed.refusal:
                raise ConfigError(listed.refusal)
            return listed
    raise ConfigError(f"{path}: was saved for the slide {slide_id}, which is not in --slides; add it")


def is_same(saved: SavedSession, replayed: SavedSession) -> bool:
    """Whether two runs of a session gave the same predictions, to 1e-6."""
    pairs = ((saved.before, replayed.before), (saved.after, replayed.after))
    return all(np.allclose(a.logits, b.logits, rtol=CLOSE, atol=CLOSE) for a, b in pairs)


def replay_sessions(
    catalogue: Catalogue, sessions: Sequence[Path], out: Path, *, tell: Callable[[str], object]
) -> list[Path]:
    """Do saved sessions again, tell what comes out and write it.

    Parameters
    ----------
    catalogue : Catalogue
    sessions : sequence of Path
        JSON files of `eosin.viewer._saved.save_session`.
    out : Path
        Gets ``<session>_replayed.json``, of the same form.
    tell : callable
        Gets one sentence per session, and whether the numbers are those that were saved.

    Returns
    -------
    list of Path

    Raises
    ------
    ConfigError
        If a session does not belong to the model and the slides.
    """
    paths = []
    for session in sessions:
        saved, again = read_session(session), replay_session(catalogue, session)
        verdict = "as saved" if is_same(saved, again) else "NOT as saved"
        tell(f"{again.removed.slide_id}: {again.words} [{verdict}]")
        paths.append(out / f"{session.stem}_replayed.json")
        write_session(paths[-1], again)
    return paths
