"""Every file of a job against what it says about itself."""

from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from eosin._batch import Outcome, run_batch
from eosin._fingerprints import content_hash
from eosin._records import Record, Report
from eosin._seals import read_json
from eosin._spread import FOLDERS, whole_folder
from eosin.errors import ConfigError, FeatureFileError
from eosin.features._bag import FeatureSpec
from eosin.features._store import read_spec, verify_bag
from eosin.wsi._coordinates import read_footer, read_grid, read_quality
from eosin.wsi._grid import TileGrid
from eosin.wsi._job import STUDIES, JobFolder

PATTERNS = (
    "thumbnails/{}*.jpg",
    "contours/{}*.jpg",
    "contours_geojson/{}*.geojson",
    "*/patches/{}*_patches.h5",
    "*/features_*/{}*.h5",
)
"""With the folders of a job that is spread in the place of the braces."""
PATCHES = "_patches.h5"

Firsts = dict[Path, tuple[Path, FeatureSpec]]
"""The first sound feature file of each folder, and how its features were made."""


def verify_job(job: JobFolder, *, progress: Callable[[Record], None] | None = None) -> Report:
    """Check all files of a job.

    Feature files: every byte, every rule of the format, one specification per folder, and the tiles of today's
    coordinates file. Coordinates files: structure, and checksums of rows and quality scores. Pictures: that they can be
    read and are those that a coordinates file of the slide names. Outlines, which people edit: that they can be read.

    Parameters
    ----------
    job : JobFolder
        The job.
    progress : callable, optional
        Called with each record.

    Returns
    -------
    Report
        One record per file, named by its path in the job; failed ones carry the reason, for example ``damaged``,
        ``mismatch`` or ``stale``.

    Raises
    ------
    ConfigError
        When the folder is missing or holds nothing of a job.
    """
    places = [(study, part) for study in ("", f"{STUDIES}/*/") for part in ("", f"{FOLDERS}/")]
    patterns = [f"{study}{pattern.format(part)}" for study, part in places for pattern in PATTERNS]
    files = sorted({path for pattern in patterns for path in job.root.glob(pattern) if not path.name.startswith(".")})
    if not files:
        raise ConfigError(f"{job.root}: not a job folder, or an empty one; pass the --job of `eosin tile`")
    return run_batch(
        files,
        partial(_verify_file, firsts={}),
        key=lambda path: path.relative_to(job.root).as_posix(),
        stage="verify",
        progress=progress,
    )


def _verify_file(path: Path, firsts: Firsts) -> Outcome:
    """Check one file of a job by the kind that its name and folder say.

    Raises
    ------
    FeatureFileError
        Saying what is wrong.
    """
    if path.suffix == ".jpg":
        return _verify_picture(path)
    if path.suffix == ".geojson":
        return _verify_outline(path)
    return _verify_coordinates(path) if path.name.endswith(PATCHES) else _verify_features(path, firsts)


def _verify_features(path: Path, firsts: Firsts) -> Outcome:
    bag = verify_bag(path)
    if bag.slide_id != path.stem:
        raise FeatureFileError(path, f"holds slide {bag.slide_id}; it was renamed or copied", code="mismatch")
    first, expected = _first_readable(path, firsts)
    expected.require_match(bag.spec, path, expected_by=str(first))
    if bag.grid is not None and _are_others(bag.grid, path):
        raise FeatureFileError(
            path, "was made from other tiles than this job has now; extract the slide again", code="stale"
        )
    return Outcome("ok" if bag.n_instances else "empty")


def _first_readable(path: Path, firsts: Firsts) -> tuple[Path, FeatureSpec]:
    """Return the first sound file of the folder, which sets what the others must be, and what it is.

    Files are checked in the order of their names, so that it is the first that comes here of each folder: to list the
    folder for each of n files would take n² steps.
    """
    folder = whole_folder(path)
    if folder not in firsts:
        firsts[folder] = path, read_spec(path)
    return firsts[folder]


def _are_others(grid: TileGrid, path: Path) -> bool:
    """Tell whether the job's coordinates file, where it is sound, has other tiles than `grid`."""
    try:
        tiling = whole_folder(path).parent
        today = read_grid(JobFolder(tiling.parent).patches(tiling.name, path.stem))
    except FeatureFileError:
        return False
    images = {today.image, grid.image} - {""}
    return len(images) > 1 or not np.array_equal(today.origins_px0, grid.origins_px0)


def _verify_coordinates(path: Path) -> Outcome:
    grid, footer = read_grid(path), read_footer(path)
    read_quality(path)  # raises when the scores are damaged
    if footer.slide_id != path.name.removesuffix(PATCHES):
        raise FeatureFileError(path, f"holds slide {footer.slide_id}; it was renamed or copied", code="mismatch")
    return Outcome("ok" if grid.n_tiles else "empty")


def _verify_picture(path: Path) -> Outcome:
    try:
        with Image.open(path) as picture:
            picture.load()
    except (OSError, UnidentifiedImageError, ValueError, SyntaxError) as error:
        raise FeatureFileError(path, f"cannot be decoded ({error}); tile the slide again", code="damaged") from error
    stated = _stated_pictures(path)
    if stated and content_hash(path) not in stated:
        raise FeatureFileError(path, "is not the picture that eosin wrote; tile the slide again", code="damaged")
    return Outcome()


def _stated_pictures(path: Path) -> set[str]:
    """Return the hashes of the pictures that were written with the slide's coordinates, of any tiling."""
    job, stated = JobFolder(whole_folder(path).parent), set[str]()
    for folder in job.root.glob("*/patches"):
        with suppress(FeatureFileError):
            stated.update(read_footer(job.patches(folder.parent.name, path.stem)).pictures.split())
    return stated


def _verify_outline(path: Path) -> Outcome:
    try:
        kind = read_json(path)["type"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise FeatureFileError(path, f"is not valid GeoJSON ({error}); tile the slide again", code="damaged") from error
    return Outcome(message=str(kind))
