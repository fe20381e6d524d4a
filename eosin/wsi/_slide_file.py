"""Which files are slides, and how one is opened: the top of the readers, the only module that knows all of them."""

import logging
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from eosin._columns import SLIDE_COLUMNS
from eosin._files import file_fingerprint, paths_of
from eosin._names import SLIDE_SUFFIXES, as_url, is_folder_slide, is_picture, is_slide, is_unread, slide_stem
from eosin._tables import SUFFIXES, decimal_point, of_slides, read_table
from eosin.errors import ConfigError, SlideError, SlideOpenError
from eosin.wsi._array_impl import PictureReader
from eosin.wsi._dicom import group_series
from eosin.wsi._dicom_impl import DicomReader
from eosin.wsi._geometry import check_levels
from eosin.wsi._openslide_impl import OpenSlideReader
from eosin.wsi._picture import is_written_by_eosin
from eosin.wsi._remote import RemoteFile, fetch, open_copy, working_ahead
from eosin.wsi._slide import Slide
from eosin.wsi._tiff_impl import TiffReader
from eosin.wsi._zarr_impl import ZarrReader
from eosin.wsi.inventory import scenes
from eosin.wsi.reader import READERS, Reader

logger = logging.getLogger(__name__)

SceneChoice = int | Literal["all"] | None
"""Which slide of files that hold several, from 1; ``all`` makes each a slide of its own, None takes the largest."""

JOB_PICTURES = ("thumbnails", "contours", "previews", "heatmaps")

# the last is asked first: pictures are asked after all others, since a file may be named like one
for _kind in (PictureReader, OpenSlideReader, TiffReader, DicomReader, ZarrReader):
    READERS.register(_kind)


@dataclass(frozen=True)
class SlideFile:
    """One slide of a batch.

    Parameters
    ----------
    path : Path
        The file; of a slide in a store the place of its copy.
    slide_id : str
        Names the slide's results.
    mpp : float or None
        The user's µm per level-0 pixel; None takes the file's.
    scene, plane : int or None
        Which picture and which focal plane of the file, counted from 1; None takes what `choose_picture` takes.
    unread : bool
        Whether no reader takes its format.
    url : str
        Where it comes from; empty for a file on a disk.
    """

    path: Path
    slide_id: str
    mpp: float | None = None
    scene: int | None = None
    plane: int | None = None
    unread: bool = False
    url: str = ""

    def stage(self) -> None:
        """Copy it from its store, where it has one; `open` does so, too."""
        if self.url:
            fetch(RemoteFile(self.url))

    def version(self) -> str:
        """Return 16 hexadecimal digits that change with the file; a store is asked, and nothing is copied."""
        return RemoteFile(self.url).version().key() if self.url else file_fingerprint(self.path)

    @property
    def reading(self) -> object:
        """What the user decides of how it is read: the mpp, with scene and focal plane where they are chosen."""
        return self.mpp if (self.scene, self.plane) == (None, None) else [self.mpp, self.scene, self.plane]

    def open(self, *, mpp: float | None = None) -> Slide:
        """Open it; see `open_slide`.

        Parameters
        ----------
        mpp : float, optional
            µm per level-0 pixel in place of its own, as a coordinates file states it.
        """
        mpp = self.mpp if mpp is None else mpp
        if not self.url:
            return open_slide(self.path, mpp=mpp, scene=self.scene, plane=self.plane)
        return open_copy(
            RemoteFile(self.url), lambda path: open_slide(path, mpp=mpp, scene=self.scene, plane=self.plane)
        )


def copy_ahead(slides: Iterable[SlideFile]) -> AbstractContextManager[None]:
    """Copy the next slides from their stores while the block runs; see `eosin.wsi._remote.working_ahead`."""
    return working_ahead([RemoteFile(slide.url) for slide in slides if slide.url])


def open_file(path: Path) -> Reader:
    """Open a file with the reader for what it is.

    Raises
    ------
    SlideOpenError
        If no reader takes it, or it is damaged.
    """
    return READERS.find(path)(path)


def open_slide(
    path: Path | str, *, mpp: float | None = None, scene: int | None = None, plane: int | None = None
) -> Slide:
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

    Returns
    -------
    Slide
        Open; use it in a ``with`` statement, or close it.

    Raises
    ------
    SlideOpenError
        If there is no such file, no reader takes it, it is damaged, or it holds no slide.
    SlideError
        Code ``bad-pyramid``, ``missing-tiles``, ``no-scene`` or ``no-plane``.
    """
    path = Path(path)
    if not path.exists():
        raise SlideOpenError(path, "no such file; check the path", code="missing")
    with open_file(path) as reader:
        slide = reader.slide(scene=scene, plane=plane, mpp=mpp)
    try:  # before the first pixel is read, so that tissue and tiles never see a wrong level
        check_levels(slide)
    except BaseException:
        slide.close()
        raise
    return slide


def find_slides(
    paths: Path | str | Sequence[Path | str],
    *,
    slide_mpp: float | Path | str | None = None,
    scene: SceneChoice = None,
    plane: int | None = None,
    unread: bool = False,
) -> list[SlideFile]:
    """List the slides among files and folders.

    Parameters
    ----------
    paths : sequence of Path
        Files are taken as they are; folders are searched, with their subfolders, for known extensions. Addresses of
        files and folders in a store (``s3://``, ``gs://``, ``https://``), and tables with a column ``slide`` (or
        ``url``, ``path``) of files and addresses, count as well.
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
    given = [one for path in paths_of(paths) for one in _listed(path)]
    remotes = {remote.staged: remote for path in given if (url := as_url(path)) for remote in _in_store(url)}
    here = [path for path in given if not as_url(path)]
    files = _expand(here) if here or not remotes else []
    ids = _unique_ids([*_one_per_series(files), *(path for path in remotes if not is_unread(path))])
    if isinstance(slide_mpp, Path | str):
        stated: Mapping[str, float | None] = _read_mpp_table(Path(slide_mpp), ids)
    else:
        stated = dict.fromkeys(ids, slide_mpp)
    number = None if scene == "all" else scene
    found = [
        SlideFile(path, slide_id, stated.get(slide_id), number, plane, url=remotes[path].url if path in remotes else "")
        for slide_id, path in sorted(ids.items())
    ]
    if scene == "all":
        found = [one for slide in found for one in _scenes(slide)]
    unreadable = [*_unread(here), *(path for path in remotes if is_unread(path))]
    passed = [SlideFile(path, path.name, unread=True) for path in unreadable]
    if passed and not unread:
        logger.warning("eosin cannot read these slides: %s", ", ".join(slide.slide_id for slide in passed))
    return [*found, *passed] if unread else found


def _listed(path: Path) -> list[Path]:
    """Return the files and addresses that a table lists, relative to it; anything else as it is."""
    if path.suffix.lower() not in SUFFIXES or as_url(path) or not path.is_file():
        return [path]
    rows = read_table(path).rows(slide=("url", "path", *SLIDE_COLUMNS))
    return [Path(row["slide"]) if as_url(row["slide"]) else path.parent / row["slide"] for row in rows if row["slide"]]


def _in_store(url: str) -> list[RemoteFile]:
    """Return the file at an address, or the slides in the folder that it is."""
    remote = RemoteFile(url)
    if is_slide(Path(remote.name)) or is_unread(Path(remote.name)):
        return [remote]
    try:
        files = [RemoteFile(one) for one in remote.files()]
    except SlideOpenError as error:
        raise ConfigError(f"{url.split('?', 1)[0]}: {error.detail}") from error
    found = [one for one in files if is_slide(Path(one.name)) or is_unread(Path(one.name))]
    if not found:
        raise ConfigError(f"{url.split('?', 1)[0]}: no slide in this folder (looked for {', '.join(SLIDE_SUFFIXES)})")
    return found


def _unread(paths: Sequence[Path]) -> list[Path]:
    folders = [path for path in paths if path.is_dir() and not is_folder_slide(path)]
    return sorted({path for folder in folders for path in _walk(folder, is_unread) if not _has_reader(path)})


def _has_reader(path: Path) -> bool:
    """Return whether a reader, perhaps of a plug-in, takes a file."""
    try:
        READERS.find(path)
    except SlideOpenError:
        return False
    return True


def _may_be_slide(path: Path) -> bool:
    return is_slide(path) or (is_unread(path) and _has_reader(path))


def _scenes(slide: SlideFile) -> list[SlideFile]:
    """Return each scene of a file as a slide; a file that cannot be opened stays, and fails as a slide of the run."""
    try:
        slide.stage()
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
            raise ConfigError(f"{path}: no such file or folder; check the path")
        found = _without_outputs(path) if path.is_dir() and not is_folder_slide(path) else [path]
        if not found:
            raise ConfigError(f"{path}: no slide in this folder (looked for {', '.join(SLIDE_SUFFIXES)} and pictures)")
        for file in found:
            # links that lead nowhere, or to themselves, are a slide each, which fails under its own name
            files.setdefault(file.resolve() if file.exists() else file.absolute(), file)
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
