"""What a slide is to the rest of the package, which files are slides, and how one is opened."""

import logging
import os
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

import numpy as np
from numpy.typing import NDArray

from eosin.errors import ConfigError, SlideOpenError
from eosin.names import SLIDE_SUFFIXES, is_picture, is_slide, slide_stem
from eosin.tables import SLIDE_COLUMNS, decimal_point, of_slides, read_table
from eosin.wsi.dicom import group_series

logger = logging.getLogger(__name__)

Fact = str | int | float | list[int] | list[float] | None


class Slide(Protocol):
    """One open slide. Callers speak level-0 pixels and µm per pixel; levels stay hidden.

    A context manager; opened where it is used and never pickled.
    """

    @property
    def path(self) -> Path:
        """The file."""

    @property
    def size_px0(self) -> tuple[int, int]:
        """Width and height in level-0 pixels."""

    @property
    def mpp(self) -> float:
        """µm per level-0 pixel.

        Raises
        ------
        MissingResolutionError
            Code ``no-mpp`` or ``bad-mpp``.
        """

    @property
    def mpp_source(self) -> str:
        """Where `mpp` comes from: ``user``, ``openslide.mpp-x``, ``tiff-resolution``, ... or ``none``."""

    @property
    def bounds_px0(self) -> tuple[int, int, int, int] | None:
        """x, y, width, height of the scanned part when the file states it; QuPath's origin is its corner."""

    @property
    def icc_profile(self) -> bytes | None:
        """The colour profile that the file states for its pixels; applied only by `eosin.wsi.colour.in_srgb`."""

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

    def facts(self) -> dict[str, Fact]:
        """Return what may be shown about the file: never label, name, date or other raw properties."""

    def close(self) -> None:
        """Release the file."""

    def __enter__(self) -> Self:
        """Return the slide."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the slide."""


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
    """

    path: Path
    slide_id: str
    mpp: float | None = None


def open_slide(path: Path, *, mpp: float | None = None) -> Slide:
    """Open a slide with the first reader that can.

    Tiled JPEG slides are decoded directly, pictures (PNG, JPEG) are held in memory, TIFFs that OpenSlide refuses are
    read with tifffile, all else with OpenSlide.

    Parameters
    ----------
    path : Path
        The file.
    mpp : float, optional
        µm per level-0 pixel; overrides what the file says.

    Raises
    ------
    SlideOpenError
        If there is no such file or no reader can open it.
    """
    from eosin.wsi.array_impl import open_picture  # OpenSlide is loaded only where pixels are read
    from eosin.wsi.openslide_impl import OpenSlideReader
    from eosin.wsi.tiff_open import open_direct, open_plain

    path = Path(path)
    if not path.is_file():
        raise SlideOpenError(path, "there is no such file", code="missing")
    if is_picture(path):
        return open_picture(path, mpp=mpp)
    try:
        reference = OpenSlideReader(path, mpp=mpp)
    except SlideOpenError as error:
        if error.code != "unsupported":
            raise
        return open_plain(path, mpp=mpp)
    direct = open_direct(path, reference)
    if direct is None:
        return reference
    reference.close()
    return direct


def find_slides(paths: Sequence[Path], *, slide_mpp: float | Path | None = None) -> list[SlideFile]:
    """List the slides among files and folders.

    Parameters
    ----------
    paths : sequence of Path
        Files are taken as they are; folders are searched, with their subfolders, for known extensions.
    slide_mpp : float or Path, optional
        µm per level-0 pixel for all, or a CSV file with the columns ``slide`` and ``mpp``
        (``slide`` is a file name or an id; slides without a row keep what their file says).

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
    return [SlideFile(path, slide_id, stated.get(slide_id)) for slide_id, path in sorted(ids.items())]


def _expand(paths: Iterable[Path]) -> list[Path]:
    files: dict[Path, Path] = {}
    for path in paths:
        if not path.exists():
            raise ConfigError(f"{path}: there is no such file or folder")
        found = list(_walk(path)) if path.is_dir() else [path]
        if not found:
            raise ConfigError(f"{path}: no slide in this folder (looked for {', '.join(SLIDE_SUFFIXES)} and pictures)")
        for file in found:
            files.setdefault(file.resolve(), file)
    if not files:
        raise ConfigError("no slides were given")
    return list(files.values())


def _walk(folder: Path) -> Iterator[Path]:
    seen: set[Path] = set()
    for root, folders, names in os.walk(folder, followlinks=True):
        real = Path(root).resolve()
        if real in seen:  # a link that leads back
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            if not name.startswith(".") and is_slide(Path(name)):
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
