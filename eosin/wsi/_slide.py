"""What a slide is to the rest of the package, which files are slides, and how one is opened."""

import logging
import os
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

import numpy as np
from numpy.typing import NDArray

from eosin._names import SLIDE_SUFFIXES, is_folder_slide, is_picture, is_slide, is_unread, slide_stem
from eosin._tables import SLIDE_COLUMNS, decimal_point, of_slides, read_table
from eosin.errors import ConfigError, SlideError, SlideOpenError
from eosin.wsi._dicom import group_series
from eosin.wsi._picture import is_written_by_eosin
from eosin.wsi._pixels import WHITE, read_scaled
from eosin.wsi._resolution import Resolution, resolve_mpp
from eosin.wsi.inventory import Picture

logger = logging.getLogger(__name__)

JOB_PICTURES = ("thumbnails", "contours", "previews", "heatmaps")

Fact = str | int | float | list[int] | list[float] | None


class Slide(ABC):
    """One open slide. Callers speak level-0 pixels and µm per pixel; levels stay hidden.

    A context manager; opened where it is used and never pickled.

    Parameters
    ----------
    path : Path
        The file.
    picture : Picture
        Which of its pictures this is; gives sizes and what the file says of the resolution.
    reader : str
        Name of the reader, shown to a person.
    mpp : float, optional
        The user's µm per level-0 pixel.

    Attributes
    ----------
    size_px0 : tuple of int
        Width and height in level-0 pixels.
    bounds_px0 : tuple of int or None
        x, y, width, height of the scanned part when the file states it; QuPath's origin is its corner.
    icc_profile : bytes or None
        The colour profile that the file states for its pixels; applied only by `eosin.wsi._colour.in_srgb`.
    level_sizes, downsamples, offsets_px0 : list
        Of each stored level: width and height, level-0 pixels per pixel, and where its corner lies (level-0 pixels).
    declared : list of bool
        For each level whether the file calls it a copy of the finest one.
    residual_px0 : float or None
        How far levels are from where they were taken to be, level-0 pixels; None where nothing was compared.
    notes : list of str
        Sentences for the slide's record: what was found odd and how it was decided.
    """

    bounds_px0: tuple[int, int, int, int] | None = None
    icc_profile: bytes | None = None
    residual_px0: float | None = None
    background: tuple[int, int, int] = WHITE

    def __init__(self, path: Path, picture: Picture, *, reader: str, mpp: float | None = None) -> None:
        self.path = path
        self.picture = picture
        self.reader = reader
        self.level_sizes = list(picture.sizes_px)
        self.size_px0: tuple[int, int] = self.level_sizes[0]
        self.downsamples = list(picture.downsamples())
        self.offsets_px0 = [(0.0, 0.0)] * len(self.level_sizes)
        self.declared = [True] * len(self.level_sizes)
        # decided once, and asked for only by who needs it: a slide without mpp can still be looked at
        self.resolution: Resolution = resolve_mpp(picture.stated, power=picture.power, user_mpp=mpp)
        self.notes: list[str] = [note for note in (self.resolution.note,) if note]

    @property
    def mpp(self) -> float:
        """µm per level-0 pixel.

        Raises
        ------
        MissingResolutionError
            Code ``no-mpp`` or ``bad-mpp``.
        """
        return self.resolution.require(self.path)

    @property
    def mpp_source(self) -> str:
        """Where `mpp` comes from: ``user``, ``openslide.mpp-x``, ``tiff-resolution``, ... or ``none``."""
        return self.resolution.source

    def read(self, origin_px0: tuple[int, int], size_px: tuple[int, int], mpp: float) -> NDArray[np.uint8]:
        """Return pixels at any resolution.

        Parameters
        ----------
        origin_px0 : tuple of int
            Top-left corner x, y in level-0 pixels.
        size_px : tuple of int
            Width and height of the result.
        mpp : float
            µm per pixel of the result.

        Returns
        -------
        (h, w, 3) uint8
            RGB; what is outside the slide, missing or transparent has the background's colour.

        Raises
        ------
        CorruptSlideError
            If stored pixels cannot be decoded.
        """
        return read_scaled(
            self.read_level, self.downsamples, origin_px0, size_px, mpp / self.mpp, offsets_px0=self.offsets_px0
        )

    @abstractmethod
    def read_level(self, level: int, corner: tuple[int, int], size: tuple[int, int]) -> NDArray[np.uint8]:
        """Return pixels of one stored level, in that level's pixels; background outside."""

    def can_shrink(self, level: int, factor: int) -> bool:
        """Return whether the decoder delivers a level at a part of its size, which costs less than averaging."""
        del level
        return factor == 1

    def read_shrunk(self, level: int, corner: tuple[int, int], size: tuple[int, int], factor: int) -> NDArray[np.uint8]:
        """Return pixels of a stored level at a part of its size, in pixels of the result; see `can_shrink`."""
        del factor
        return self.read_level(level, corner, size)

    def keep_levels(self, levels: Sequence[int]) -> None:
        """Forget all stored levels but these, which include the finest."""
        self.level_sizes = [self.level_sizes[level] for level in levels]
        self.downsamples = [self.downsamples[level] for level in levels]
        self.offsets_px0 = [self.offsets_px0[level] for level in levels]
        self.declared = [self.declared[level] for level in levels]

    def facts(self) -> dict[str, Fact]:
        """Return what may be shown about the file: never label, name, date or other raw properties."""
        return {
            "reader": self.reader,
            "vendor": self.picture.vendor or None,
            "width_px0": self.size_px0[0],
            "height_px0": self.size_px0[1],
            "level_downsamples": [round(value, 4) for value in self.downsamples],
            "level_residual_px0": None if self.residual_px0 is None else round(self.residual_px0, 2),
            "mpp": self.resolution.mpp,
            "mpp_source": self.resolution.source,
            "mpp_note": self.resolution.note or self.resolution.refusal,
            "objective_power": self.picture.power,
            "colours": self.picture.colour or None,
            "icc_profile": "none" if self.icc_profile is None else f"{len(self.icc_profile)} bytes",
        }

    @abstractmethod
    def close(self) -> None:
        """Release the file."""

    def __enter__(self) -> Self:
        """Return the slide."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the slide."""
        self.close()


@dataclass(frozen=True)
class SlideFile:
    """One slide of a batch.

    Parameters
    ----------
    path : Path
        The file.
    slide_id : str
        Names the slide's results.
    mpp : float or None
        The user's µm per level-0 pixel; None takes the file's.
    scene, plane : int or None
        Which picture and which focal plane of the file, counted from 1; None takes what `choose_picture` takes.
    unread : bool
        Whether no reader takes its format.
    """

    path: Path
    slide_id: str
    mpp: float | None = None
    scene: int | None = None
    plane: int | None = None
    unread: bool = False

    def open(self, *, mpp: float | None = None) -> Slide:
        """Open it; see `open_slide`.

        Parameters
        ----------
        mpp : float, optional
            µm per level-0 pixel in place of its own, as a coordinates file states it.
        """
        return open_slide(self.path, mpp=self.mpp if mpp is None else mpp, scene=self.scene, plane=self.plane)


def open_slide(path: Path, *, mpp: float | None = None, scene: int | None = None, plane: int | None = None) -> Slide:
    """Open a slide with the reader for the kind of file that it is, and check its levels against each other.

    Parameters
    ----------
    path : Path
        The file.
    mpp : float, optional
        µm per level-0 pixel; overrides what the file says.
    scene : int, optional
        Which of the slides in the file, counted from 1 as `eosin info` lists them; by default the largest.
    plane : int, optional
        Which focal plane, counted from 1; by default the middle one.

    Raises
    ------
    SlideOpenError
        If there is no such file, no reader takes it, it is damaged, or it holds no slide.
    SlideError
        Code ``bad-pyramid``, ``missing-tiles``, ``no-scene`` or ``no-plane``.
    """
    from eosin.wsi._geometry import check_levels  # readers and their libraries are loaded only where pixels are read
    from eosin.wsi.reader import open_file

    path = Path(path)
    if not path.exists():
        raise SlideOpenError(path, "there is no such file", code="missing")
    with open_file(path) as reader:
        slide = reader.slide(scene=scene, plane=plane, mpp=mpp)
    try:  # before the first pixel is read, so that tissue and tiles never see a wrong level
        check_levels(slide)
    except BaseException:
        slide.close()
        raise
    return slide


def find_slides(
    paths: Sequence[Path],
    *,
    slide_mpp: float | Path | None = None,
    scene: int | Literal["all"] | None = None,
    plane: int | None = None,
    unread: bool = False,
) -> list[SlideFile]:
    """List the slides among files and folders.

    Parameters
    ----------
    paths : sequence of Path
        Files are taken as they are; folders are searched, with their subfolders, for known extensions.
    slide_mpp : float or Path, optional
        µm per level-0 pixel for all, or a CSV file with the columns ``slide`` and ``mpp``
        (``slide`` is a file name or an id; slides without a row keep what their file says).
    scene : int or "all", optional
        Which slide of files that hold several, counted from 1; ``all`` makes each a slide of its own, whose id ends
        with ``_scene1`` and so on. By default the largest.
    plane : int, optional
        Which focal plane, counted from 1; by default the middle one.
    unread : bool
        Whether slides in folders whose format no reader takes are listed, too, with `SlideFile.unread`; a warning
        names them otherwise.

    Returns
    -------
    list of SlideFile
        Sorted by id. The id is the file name without its slide extension; other dots stay.
        A plain picture beside a slide of the same name keeps its extension in its id. The DICOM files of one series
        in one folder are one slide, named after the first.

    Raises
    ------
    ConfigError
        If a path is missing, nothing is found, or two files would have the same id.
    """
    files = _expand([Path(path) for path in paths])
    ids = _unique_ids(_one_per_series(files))
    stated = _read_mpp_table(slide_mpp, ids) if isinstance(slide_mpp, Path) else dict.fromkeys(ids, slide_mpp)
    number = None if scene == "all" else scene
    found = [SlideFile(path, slide_id, stated.get(slide_id), number, plane) for slide_id, path in sorted(ids.items())]
    if scene == "all":
        found = [one for slide in found for one in _scenes(slide)]
    passed = [SlideFile(path, path.name, unread=True) for path in _unread([Path(path) for path in paths])]
    if passed and not unread:
        logger.warning("no reader takes these slides: %s", ", ".join(slide.slide_id for slide in passed))
    return [*found, *passed] if unread else found


def _unread(paths: Sequence[Path]) -> list[Path]:
    folders = [path for path in paths if path.is_dir() and not is_folder_slide(path)]
    return sorted({path for folder in folders for path in _walk(folder, is_unread) if not _has_reader(path)})


def _has_reader(path: Path) -> bool:
    """Return whether a reader, perhaps of a plug-in, takes a file."""
    from eosin.wsi.reader import find_reader

    try:
        find_reader(path)
    except SlideOpenError:
        return False
    return True


def _may_be_slide(path: Path) -> bool:
    return is_slide(path) or (is_unread(path) and _has_reader(path))


def _scenes(slide: SlideFile) -> list[SlideFile]:
    """Return each scene of a file as a slide; a file that cannot be opened stays, and fails as a slide of the run."""
    from eosin.wsi.inventory import scenes
    from eosin.wsi.reader import open_file

    try:
        with open_file(slide.path) as reader:
            count = len(scenes(reader.pictures))
    except SlideError:
        return [slide]
    if count < 2:
        return [slide]
    return [replace(slide, slide_id=f"{slide.slide_id}_scene{number}", scene=number) for number in range(1, count + 1)]


def _expand(paths: Iterable[Path]) -> list[Path]:
    files: dict[Path, Path] = {}
    for path in paths:
        if not path.exists():
            raise ConfigError(f"{path}: there is no such file or folder")
        found = _without_outputs(path) if path.is_dir() and not is_folder_slide(path) else [path]
        if not found:
            raise ConfigError(f"{path}: no slide in this folder (looked for {', '.join(SLIDE_SUFFIXES)} and pictures)")
        for file in found:
            files.setdefault(file.resolve(), file)
    if not files:
        raise ConfigError("no slides were given")
    return list(files.values())


def _without_outputs(folder: Path) -> list[Path]:
    """Return the slides in a folder, and say what of it eosin wrote itself."""
    found = list(_walk(folder, _may_be_slide))
    written = {path for path in found if is_written_by_eosin(path)}
    if written:
        example = min(written).relative_to(folder)
        logger.warning("%s: %d pictures that eosin wrote are left out, for example %s", folder, len(written), example)
    return [path for path in found if path not in written]


def _is_job(folder: Path) -> bool:
    """Return whether a folder is a job folder: its `run.json` says so."""
    try:
        with (folder / "run.json").open("rb") as file:
            return b'"eosin"' in file.read(200)
    except OSError:
        return False


def _walk(folder: Path, wanted: Callable[[Path], bool]) -> Iterator[Path]:
    seen: set[Path] = set()
    for root, folders, names in os.walk(folder, followlinks=True):
        real = Path(root).resolve()
        if real in seen:  # a link that leads back
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        if "run.json" in names and _is_job(Path(root)):  # pictures of eosin 0.1 have no mark
            folders[:] = [name for name in folders if name not in JOB_PICTURES]
        names += [name for name in folders if is_folder_slide(Path(root) / name)]
        folders[:] = [name for name in folders if name not in names]
        for name in sorted(names):
            if not name.startswith(".") and wanted(Path(root) / name):
                yield Path(root) / name


def _one_per_series(files: Sequence[Path]) -> list[Path]:
    grouped = group_series(files)
    for first, members in grouped.items():
        if len(members) > 1:
            logger.info("%s stands for the %d files of its DICOM series", first, len(members))
    return list(grouped)


def _unique_ids(files: Sequence[Path]) -> dict[str, Path]:
    slides = {slide_stem(path) for path in files if not is_picture(path)}
    by_id: defaultdict[str, list[Path]] = defaultdict(list)
    for path in files:
        beside_slide = is_picture(path) and slide_stem(path) in slides
        by_id[path.name if beside_slide else slide_stem(path)].append(path)
    clashes = [f"{slide_id} ({', '.join(map(str, same))})" for slide_id, same in by_id.items() if len(same) > 1]
    if clashes:
        raise ConfigError(f"slides with the same name would overwrite each other's results: {'; '.join(clashes)}")
    return {slide_id: same[0] for slide_id, same in by_id.items()}


def _read_mpp_table(path: Path, slides: Iterable[str]) -> Mapping[str, float]:
    rows = read_table(path).rows(slide=SLIDE_COLUMNS, mpp=())
    return of_slides([_mpp_row(row, path) for row in rows if row["mpp"]], slides, str(path))


def _mpp_row(row: Mapping[str, str], path: Path) -> tuple[str, float]:
    try:
        return row["slide"], float(decimal_point(row["mpp"]))
    except ValueError:
        raise ConfigError(f"{path}: slide {row['slide']!r} has the mpp {row['mpp']!r}, which is not a number") from None
