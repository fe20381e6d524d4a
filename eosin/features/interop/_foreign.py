"""What every foreign file is reduced to, what only the user can add, and how the result is written."""

import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Annotated

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from eosin._files import file_fingerprint
from eosin._names import match_slides
from eosin._tables import TextFile, csv_text
from eosin.errors import FeatureFileError, UnknownNameError
from eosin.features._bag import FeatureBag, FeatureSpec
from eosin.features._encoders import find_encoder
from eosin.features._store import MAX_BYTES, MAX_DIM, MAX_ROWS, SUFFIX, read_spec, write_bag
from eosin.options import Options
from eosin.wsi._coordinates import nominal_magnification, write_grid
from eosin.wsi._grid import TileGrid, Tiling
from eosin.wsi._job import JobFolder
from eosin.wsi._slide_file import find_slides, open_slide

Numbers = NDArray[np.generic]
PATCHES = "_patches"
CLOSE_MPP = 0.02
CLOSE_POWER = 0.25
BETWEEN_PX = 1e-3


class ImportOptions(Options):
    """What files of other tools may not say.

    Parameters
    ----------
    encoder : str, optional
        Name of the encoder that made the features, where the file is silent or has a name of its own for it.
    slide_mpp : float, optional
        µm per level-0 pixel of the slide.
    slide : Path, optional
        The slide itself, for its mpp, size and fingerprint, or a folder of slides, of which the one of the file's name
        is taken.
    coords : Path, optional
        Coordinates file that belongs to features without tile coordinates, or a folder of such files.
    tile_size : int, optional
        Side of a tile in level-0 pixels, for coordinates that do not say it; the distance of neighbours unless given.
    force : bool
        Import what contradicts itself, the slide or these options all the same; the result says so.
    """

    encoder: str | None = None
    slide_mpp: Annotated[float, Field(gt=0.01, lt=100)] | None = None
    slide: Path | None = None
    coords: Path | None = None
    tile_size: Annotated[int, Field(ge=1)] | None = None
    force: bool = False

    def of(self, path: Path) -> "ImportOptions":
        """Return the options with the slide and the coordinates of one file in the place of folders of them.

        Raises
        ------
        FeatureFileError
            When a folder has none for this file.
        """
        name = path.stem.removesuffix(PATCHES)
        found: dict[str, Path | None] = {}
        if self.slide is not None and self.slide.is_dir():
            found["slide"] = _slide_called(name, self.slide)
        if self.coords is not None and self.coords.is_dir():
            files = (self.coords / f"{name}{end}" for end in (SUFFIX, PATCHES + SUFFIX))
            found["coords"] = next((file for file in files if file.is_file()), None)
        for option, file in found.items():
            if file is None:
                folder = getattr(self, option)
                raise FeatureFileError(path, f"has no {option} called {name} in {folder}", code="incomplete")
        return self.model_copy(update=found)


def _slide_called(name: str, folder: Path) -> Path | None:
    """Return the slide of a folder that a file is named after."""
    slides = _slides(folder)
    meant = match_slides([(name, name)], slides, where=str(folder)).values
    return next((slides[slide] for slide in meant), None)


@lru_cache(maxsize=4)
def _slides(folder: Path) -> dict[str, Path]:
    return {slide.slide_id: slide.path for slide in find_slides([folder])}


@dataclass(frozen=True)
class SlideFacts:
    """What is known about the slide that a file belongs to.

    Parameters
    ----------
    mpp : float or None
        µm per level-0 pixel.
    size_px0 : (int, int) or None
        Width and height.
    fingerprint : str
        Of the slide's file; empty when it is not available.
    source : str
        Which option it is known from.
    """

    mpp: float | None = None
    size_px0: tuple[int, int] | None = None
    fingerprint: str = ""
    source: str = "--slide-mpp"

    @classmethod
    def from_options(cls, options: ImportOptions) -> "SlideFacts":
        """Collect them from the slide, where it is available, and the options."""
        if options.slide is None:
            return cls(options.slide_mpp)
        with open_slide(options.slide, mpp=options.slide_mpp) as slide:
            return cls(slide.mpp, slide.size_px0, file_fingerprint(options.slide), f"--slides {options.slide}")

    def require_mpp(self, path: Path, magnification: float | None = None) -> float:
        """Return the slide's mpp; the magnification that a file states is named where nobody says it.

        Raises
        ------
        FeatureFileError
            When nobody has said it.
        """
        if self.mpp is None:
            usual = "X" if magnification is None else f"{10 / magnification:g}"
            stated = "" if magnification is None else f"states {magnification:g}x, and "
            message = f"{stated}does not say the slide's µm/px; pass --slide-mpp {usual} or --slides FILE"
            raise FeatureFileError(path, message, code="incomplete")
        return self.mpp


@dataclass(frozen=True)
class Places:
    """Where foreign tiles lie.

    Parameters
    ----------
    origins_px0 : (n, 2)
        Top-left corners, level-0 pixels.
    tile_px0 : int
        Side in level-0 pixels.
    patch_size : int
        Side of the tile that was encoded, in its own pixels.
    overlap : int
        Pixels of such a tile that neighbours share.
    slide_size_px0 : (int, int) or None
        Width and height of the slide where the file says it.
    size_slack_px0 : float
        By how much the true size may differ, where it is computed from that of a smaller level.
    magnification : float or None
        Of level 0 where the file says it.
    mpp : float or None
        µm per level-0 pixel where the file says it.
    doubts : tuple of str
        What the file says that contradicts itself.
    """

    origins_px0: Numbers
    tile_px0: int
    patch_size: int
    overlap: int = 0
    slide_size_px0: tuple[int, int] | None = None
    size_slack_px0: float = 0.0
    magnification: float | None = None
    mpp: float | None = None
    doubts: tuple[str, ...] = ()

    def contradictions(self, slide: SlideFacts) -> list[str]:
        """Return what cannot be true at once: within the file, or of the file and what is known of the slide."""
        return [*self.doubts, *self._about_scale(slide), *self._about_size(slide), *self._about_corners(slide)]

    def _about_scale(self, slide: SlideFacts) -> list[str]:
        if slide.mpp is None:
            return []
        said = f"{slide.source} says {slide.mpp:g} µm/px"
        if self.mpp is not None and abs(slide.mpp / self.mpp - 1) > CLOSE_MPP:
            return [f"states {self.mpp:g} µm per level-0 pixel, but {said}"]
        power = self.magnification
        if power is None or nominal_magnification(slide.mpp) == power:
            return []
        if abs(slide.mpp * power / 10 - 1) < CLOSE_POWER:  # a scanner between two steps of the table
            return []
        return [f"states that level 0 is {power:g}x, about {10 / power:g} µm/px, but {said}"]

    def _about_size(self, slide: SlideFacts) -> list[str]:
        if slide.size_px0 is None or self.slide_size_px0 is None:
            return []
        pairs = zip(slide.size_px0, self.slide_size_px0, strict=True)
        if all(abs(known - stated) <= self.size_slack_px0 for known, stated in pairs):
            return []
        stated, known = (" x ".join(map(str, size)) for size in (self.slide_size_px0, slide.size_px0))
        return [f"was made from a slide of {stated} px, but that of {slide.source} has {known} px"]

    def _about_corners(self, slide: SlideFacts) -> list[str]:
        corners = np.asarray(self.origins_px0, np.float64).reshape(-1, 2)
        size, found = slide.size_px0 or self.slide_size_px0, []
        nowhere = ~np.isfinite(corners).all(axis=1)
        if nowhere.any():
            return [f"has {nowhere.sum()} of {len(corners)} tiles whose coordinates are not numbers"]
        between = (np.abs(corners - np.rint(corners)) > BETWEEN_PX).any(axis=1)
        if between.any():
            x, y = corners[between][0]
            found.append(f"has {between.sum()} of {len(corners)} tiles between pixels, the first at {x:g}, {y:g}")
        doubled = len(corners) - len(np.unique(corners, axis=0))
        if doubled:
            found.append(f"has {doubled} of {len(corners)} tiles at the place of another one")
        below = (corners < 0).any(axis=1)
        if below.any():
            x, y = corners[below][0]
            found.append(f"has {below.sum()} of {len(corners)} tiles with corners below 0, the first at {x:g}, {y:g}")
        if size is None:
            return found
        beyond = (corners >= np.array(size) + self.size_slack_px0).any(axis=1)
        if beyond.any():
            (x, y), of = corners[beyond][0], f"{size[0]} x {size[1]} px"
            found.append(
                f"has {beyond.sum()} of {len(corners)} tiles outside the slide of {of}, the first at {x:g}, {y:g}"
            )
        return found

    def grid(self, slide: SlideFacts, path: Path) -> TileGrid:
        """Return the places as a grid of ours.

        Raises
        ------
        FeatureFileError
            When sizes make no sense or the slide's mpp is unknown.
        """
        corners = np.asarray(self.origins_px0, np.float64).reshape(-1, 2)
        if not np.isfinite(corners).all():
            raise FeatureFileError(path, "has coordinates that are not numbers, so its tiles lie nowhere")
        if self.tile_px0 < 1 or self.patch_size < 1 or not (corners >= 0).all():
            raise FeatureFileError(path, f"has tiles of {self.tile_px0} px, or corners below 0, which cannot be")
        origins = np.rint(corners).astype(np.int64)
        mpp = slide.require_mpp(path, self.magnification)
        extent = origins.max(axis=0, initial=0) + self.tile_px0
        size = slide.size_px0 or self.slide_size_px0 or (int(extent[0]), int(extent[1]))
        tiling = Tiling.parse(
            {
                "mpp": round(mpp * self.tile_px0 / self.patch_size, 6),
                "patch_size": self.patch_size,
                "overlap": min(self.overlap, self.patch_size - 1),
                "min_tissue": 0.0,
            },
            source=str(path),
        )
        return TileGrid(origins, self.tile_px0, tiling, size, mpp)


@dataclass(frozen=True)
class Foreign:
    """One slide's worth of a foreign file.

    Parameters
    ----------
    slide_id : str
        The slide.
    features : (n, D) or (D,), optional
        None for files of coordinates.
    places : Places, optional
        None for features without tile coordinates.
    encoder : str, optional
        As the file names it.
    label : str, optional
        Where the file has one.
    corners : (n, 2), optional
        Places whose tile size the file does not say.
    facts : mapping of str to str
        For the provenance.
    """

    slide_id: str
    features: Numbers | None = None
    places: Places | None = None
    encoder: str | None = None
    label: str | None = None
    corners: Numbers | None = None
    facts: Mapping[str, str] = field(default_factory=dict)


def table_text(header: Sequence[str], rows: Iterable[Iterable[object]]) -> str:
    """Return a table as CSV."""
    return csv_text([header, *rows])


LABEL_COLUMNS = ("patient_id", "slide_id", "label")


def merged_labels(table: Path, labels: Mapping[str, str], path: Path) -> str:
    """Return the table of labels with those of another file added, each slide its own patient.

    Parameters
    ----------
    table : Path
        ``labels.csv`` of earlier imports, where there is one.
    labels : mapping of str to str
        Label by slide.
    path : Path
        Where they are from.

    Raises
    ------
    FeatureFileError
        When a slide has another label there already, or the table is not one of ours.
    """
    rows = _read_labels(table)
    for slide_id, label in labels.items():
        _, known = rows.setdefault(slide_id, (slide_id, label))
        if known != label:
            raise FeatureFileError(
                path,
                f"labels {slide_id} as {label!r}, but {table} as {known!r}; correct one or choose another --out",
                code="labels",
            )
    return table_text(LABEL_COLUMNS, [(patient, slide_id, label) for slide_id, (patient, label) in rows.items()])


def _read_labels(table: Path) -> dict[str, tuple[str, str]]:
    """Return patient and label by slide."""
    if not table.is_file():
        return {}
    header, *rows = [row for _, row in TextFile(table).rows()] or [[]]
    if tuple(header) != LABEL_COLUMNS or any(len(row) != len(LABEL_COLUMNS) for row in rows):
        raise FeatureFileError(
            table, f"already exists with other columns; expected only {', '.join(LABEL_COLUMNS)}; choose another --out"
        )
    return {slide_id: (patient, label) for patient, slide_id, label in rows}


def safe_id(name: object, path: Path) -> str:
    """Return a slide id that is a plain file name.

    Raises
    ------
    FeatureFileError
        When the file's name for its slide would lead elsewhere.
    """
    text = str(name)
    if not text or Path(text).name != text or text.startswith(".") or "\\" in text or "\0" in text:
        raise FeatureFileError(path, f"names its slide {text!r}, which cannot be a file name", code="unsafe")
    return text


@dataclass(frozen=True)
class Stored:
    """A file that was written, and what a person should know of it."""

    path: Path
    notes: tuple[str, ...] = ()


def store(foreign: Foreign, path: Path, out: Path, options: ImportOptions) -> Stored:
    """Write one slide as a file of ours.

    Parameters
    ----------
    foreign : Foreign
        What was read.
    path : Path
        Where from, for messages.
    out : Path
        Features go to ``OUT/features``, coordinates to ``OUT/<tiling>/patches``.
    options : ImportOptions
        What the user added.

    Returns
    -------
    Stored

    Raises
    ------
    FeatureFileError
        When something is missing or not finite; with the code ``contradiction`` when the file contradicts itself, the
        slide or an option, unless that is forced.
    """
    slide = SlideFacts.from_options(options)
    notes: list[str] = []
    if foreign.places is None and foreign.corners is not None:
        found, note = _places_by_distance(foreign.corners, slide, options)
        foreign, notes = replace(foreign, places=found), [note]
    _require_as_many_rows(foreign, path)
    faults = [] if foreign.places is None else foreign.places.contradictions(slide)
    faults += _about_encoder(options.encoder, foreign.encoder) + _about_tile(options.tile_size, foreign.places)
    if faults and not options.force:
        advice = "correct the file or the option, or pass --force to import it all the same"
        raise FeatureFileError(path, f"{'; '.join(faults)}; {advice}", code="contradiction")
    if faults:
        foreign = replace(foreign, facts={**foreign.facts, "forced": "; ".join(faults)})
        notes.append(f"imported with --force although it {'; it '.join(faults)}")
        if foreign.places is not None and options.tile_size is not None:
            foreign = replace(foreign, places=replace(foreign.places, tile_px0=options.tile_size))
    if foreign.features is None:
        return Stored(_store_coordinates(foreign, path, out, slide), tuple(notes))
    grid = foreign.places.grid(slide, path) if foreign.places else None
    rows = _checked(foreign.features, path, alone=grid is None)
    spec = FeatureSpec(
        encoder=_encoder(options.encoder or foreign.encoder, path),
        dim=rows.shape[1],
        mpp=grid.tiling.mpp if grid else None,
        patch_size=grid.tiling.patch_size if grid else None,
    )
    facts = {"imported_from": path.name, "mpp_source": "user", **foreign.facts}
    if slide.fingerprint:
        facts["input_fingerprint"] = slide.fingerprint
    target = out / "features" / f"{safe_id(foreign.slide_id, path)}{SUFFIX}"
    require_same_kind(target, spec)
    write_bag(target, FeatureBag(rows, spec, foreign.slide_id, grid, facts))
    return Stored(target, tuple(notes))


def _require_as_many_rows(foreign: Foreign, path: Path) -> None:
    if foreign.features is None or foreign.places is None or foreign.features.ndim != 2:
        return
    rows, places = len(foreign.features), len(np.reshape(foreign.places.origins_px0, (-1, 2)))
    if rows != places:
        raise FeatureFileError(path, f"has {rows} rows of features for {places} places")


def _places_by_distance(corners: Numbers, slide: SlideFacts, options: ImportOptions) -> tuple[Places | None, str]:
    """Return places whose tiles are as large as neighbours are apart, and what is to be said of that."""
    side = options.tile_size or _distance(corners)
    if side is None or slide.mpp is None:
        hint = "" if side is None else f" (neighbours are {side} px apart)"
        return None, (
            f"does not say how large its tiles are{hint}, so its places are left out; pass --coords FOLDER, or "
            "--tile-size PX, with --slide-mpp or --slides"
        )
    said = (
        "as --tile-size says" if options.tile_size else "which is the distance of neighbours; pass --tile-size if not"
    )
    return Places(corners, side, side), f"does not say how large its tiles are; taken for {side} px of level 0, {said}"


def _distance(corners: Numbers) -> int | None:
    """Return the step of a lattice, the same in both directions; None where there is none."""
    steps = {int(np.gcd.reduce(np.diff(np.unique(axis)).astype(np.int64))) for axis in corners.reshape(-1, 2).T}
    steps.discard(0)
    return steps.pop() if len(steps) == 1 else None


def _about_tile(asked: int | None, places: Places | None) -> list[str]:
    if asked is None or places is None or asked == places.tile_px0:
        return []
    return [f"states tiles of {places.tile_px0} px of level 0, but --tile-size says {asked}"]


def _about_encoder(asked: str | None, stated: str | None) -> list[str]:
    """Return how the option contradicts the file; a name that eosin does not know may be another name of the same."""
    if not asked or not stated:
        return []
    try:
        ours, theirs = find_encoder(asked).name, find_encoder(stated).name
    except UnknownNameError:
        return []
    return [f"states the encoder {stated}, but --encoder says {asked}"] if ours != theirs else []


def require_same_kind(target: Path, spec: FeatureSpec) -> None:
    """Refuse to put features into a folder of features that were made differently.

    Raises
    ------
    FeatureMismatchError
        Naming the new file and one that is there.
    """
    with suppress(FileNotFoundError), os.scandir(target.parent) as entries:  # one entry: listing all for each is n²
        for entry in entries:
            if entry.name.endswith(SUFFIX) and not entry.name.startswith(".") and entry.name != target.name:
                other = target.with_name(entry.name)
                read_spec(other).require_match(spec, target, expected_by=str(other))
                return


def _store_coordinates(foreign: Foreign, path: Path, out: Path, slide: SlideFacts) -> Path:
    assert foreign.places is not None
    grid = foreign.places.grid(slide, path)
    target = JobFolder(out).patches(grid.tiling.folder, safe_id(foreign.slide_id, path))
    forced = foreign.facts.get("forced", "")
    source = f"user, forced: {forced}" if forced else "user"
    write_grid(target, grid, slide_id=foreign.slide_id, mpp_source=source, fingerprint=slide.fingerprint)
    return target


def _checked(features: Numbers, path: Path, *, alone: bool) -> NDArray[np.float16] | NDArray[np.float32]:
    """Return rows (n, D); one vector without tile coordinates is a bag of one row."""
    rows = features[None] if features.ndim == 1 and alone and features.size else features
    if rows.ndim == 1 and rows.size == 0:
        raise FeatureFileError(path, "has no tiles and does not state the number of features per tile", code="empty")
    if (
        rows.ndim != 2
        or len(rows) > MAX_ROWS
        or 4 * rows.size > MAX_BYTES
        or rows.shape[1] > MAX_DIM
        or rows.dtype.kind not in "fiu"
    ):
        raise FeatureFileError(path, f"features are {rows.shape} of {rows.dtype}; expected (n, D) numbers")
    if not np.isfinite(rows).all():
        raise FeatureFileError(path, "holds infinite or NaN features", code="non-finite")
    return rows.astype(np.float16) if rows.dtype == np.float16 else rows.astype(np.float32)


def _encoder(name: str | None, path: Path) -> str:
    if not name:
        raise FeatureFileError(
            path, "does not state the encoder of its features; pass --encoder NAME", code="incomplete"
        )
    try:
        return find_encoder(name).name
    except UnknownNameError:
        return name
